"""Laws from data whose law is known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares

from scaling.study import results
from scaling.study.laws import Point, describe, envelope, fit_laws, law, spearman
from scaling.study.solve import fit, predict

E, A, ALPHA = 20.0, 8.0, 0.4
X = np.geomspace(3e-4, 0.1, 12)


def made(
    noise: float = 0.0, seeds: int = 1, rng: int = 0, x: np.ndarray = X, amount: float = A
) -> list[Point]:
    """Points of one value each, of E + amount x^-ALPHA with log-normal noise."""
    draw = np.random.default_rng(rng)
    y = E + amount * x**-ALPHA
    return [
        Point(f"{i}", np.array([a]), b * np.exp(noise * draw.normal(size=(seeds, 1))))
        for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]


def test_exact_data_give_the_law_back() -> None:
    found = law(made(), frontier=False)
    assert found["identified"]
    np.testing.assert_allclose([found["E"], found["A"], found["alpha"]], [E, A, ALPHA], rtol=1e-6)
    assert found["held_out"]["left_out"] == ["10", "11"]
    assert found["held_out"]["mean_error"] < 1e-6
    assert (found["points"], found["runs"]) == (12, 12)


def test_exact_data_without_an_irreducible_term() -> None:
    points = [Point("", p.x, p.y - E) for p in made()]
    found = law(points, frontier=False)
    np.testing.assert_allclose([found["alpha"], found["slope"]], ALPHA, rtol=1e-4)
    assert found["E"] < 0.02


@pytest.mark.parametrize("rng", [0, 1, 2])
def test_the_fit_is_the_optimum_that_scipy_finds(rng: int) -> None:
    points = made(0.05, rng=rng)
    x, y = (np.array([getattr(p, name).mean() for p in points]) for name in "xy")
    ours = fit([(x, y)])
    u = np.log(x) - ours.centre

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.log(y) - np.logaddexp(theta[0] - theta[1] * u, theta[2])

    starts = ([4.0, 0.3, 3.0], [4.0, 0.8, 3.0], [4.0, 0.3, -4.0])
    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14}
    fits = [least_squares(residuals, s, loss="huber", f_scale=ours.delta, **tight) for s in starts]
    theirs = min(fits, key=lambda f: f.cost)
    np.testing.assert_allclose(predict(ours, x)[0], y / np.exp(residuals(theirs.x)), rtol=1e-5)
    np.testing.assert_allclose(ours.theta[0], theirs.x, rtol=2e-3)


def test_one_wild_point_does_not_bend_the_law() -> None:
    points = made(0.01)
    points[5] = Point("5", points[5].x, points[5].y * 3)
    assert abs(law(points, frontier=False)["alpha"] - ALPHA) < 0.06


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_cover_the_truth(seeds: int) -> None:
    """A 90% interval misses one in ten: of 25, fewer than 19 hits has a chance below 1 in 100."""
    tried = [law(made(0.04, seeds, rng), frontier=False, resamples=80) for rng in range(25)]
    hits = [low <= ALPHA <= high for low, high in (t["alpha_interval"] for t in tried)]
    assert sum(hits) >= 19
    assert all(t["identified"] for t in tried)
    widths = [t["alpha_interval"][1] - t["alpha_interval"][0] for t in tried]
    assert np.median(widths) < 0.25


def test_noise_alone_is_not_identified() -> None:
    tried = [law(made(0.1, rng=rng, amount=0.0), frontier=False, resamples=100) for rng in range(8)]
    assert not any(found["identified"] for found in tried)
    assert all("not identified" in describe(found) for found in tried)
    for found in tried:
        assert ("which includes 0" in found["reason"]) == (found["alpha_interval"][0] <= 0)
    assert any("which includes 0" in found["reason"] for found in tried)


def test_too_narrow_a_range_is_not_identified() -> None:
    found = law(made(0.05, x=np.geomspace(0.01, 0.02, 8)), frontier=False, resamples=100)
    assert not found["identified"]


def test_few_points_say_so() -> None:
    found = law(made()[:4], frontier=False)
    assert not found["identified"]
    assert found["reason"] == "4 different x for three parameters; at least 5 are needed"
    assert law([], frontier=True)["reason"].startswith("0 frontier points")
    five = law(made()[:5], frontier=False)
    assert five["identified"]
    assert "fewer than 5 points remain" in five["held_out"]["reason"]


def test_held_out_error_tells_a_law_that_breaks() -> None:
    points = made(0.01)
    for i in (10, 11):
        points[i] = Point(points[i].label, points[i].x, points[i].y * 1.5)
    held = law(points, frontier=False)["held_out"]
    assert all(p["error"] < -0.2 for p in held["predictions"])
    assert all(p["interval"][1] < p["actual"] for p in held["predictions"])


def test_envelope() -> None:
    x, y = np.array([3.0, 1.0, 2.0, 2.0, 4.0]), np.array([5.0, 9.0, 7.0, 6.0, 5.0])
    np.testing.assert_array_equal(envelope(x, y), [1, 3, 0])


def test_frontier_law_of_curves() -> None:
    """Curves E + N^-1/2 + D^-1/2 at compute N D touch a frontier of exponent 1/4 (Hoffmann et al., eq. 4)."""
    sizes, data = np.geomspace(1, 1e4, 25), np.geomspace(1, 1e6, 200)
    points = [Point(f"{n:.3g}", n * data, (0.1 + n**-0.5 + data**-0.5)[None]) for n in sizes]
    points = [
        Point(p.label, p.x[inside], p.y[:, inside])
        for p in points
        if (inside := (p.x > 10) & (p.x < 1e8)).any()
    ]
    found = law(points, frontier=True, resamples=100)
    assert found["identified"]
    low, high = found["alpha_interval"]
    assert abs(found["alpha"] - 0.25) < 0.03
    assert low < 0.27 and high > 0.23
    assert abs(found["E"] - 0.1) < 0.02


def test_spearman() -> None:
    assert spearman(made()) == pytest.approx(-1.0)
    assert spearman(made()[:2]) is None


def test_a_study_folder(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, seeds=(0, 1), noise=0.02, law=(E, A, ALPHA))
    found = fit_laws(results.read(root))
    assert found["fitted"] == "fd_mnist"
    assert found["gmacs"]["points"] == 12
    assert found["gmacs"]["runs"] == 24
    low, high = found["gmacs"]["alpha_interval"]
    assert low < ALPHA < high
    assert found["spearman"] < -0.95
    assert found["train_flops"]["identified"]
    assert found["train_flops"]["held_out"]["predictions"]


def test_an_accuracy_is_fitted_as_an_error(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.02, 0.004, 0.5), noise=0.02)
    found = fit_laws(results.read(root))
    assert found["fitted"] == "1 - val_top1"
    assert abs(found["gmacs"]["alpha"] - 0.5) < 0.08
    assert found["spearman"] < -0.95
