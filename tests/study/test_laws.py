"""Laws from data whose law is known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares

from scaling.study import results
from scaling.study.laws import Point, describe, envelope, fit_laws, law, spearman
from scaling.study.power_law_fit import fit, predict

E, A, ALPHA = 20.0, 8.0, 0.4
X = np.geomspace(3e-4, 0.1, 12)


def synthetic_points(
    noise: float = 0.0, seeds: int = 1, rng: int = 0, x: np.ndarray = X, amount: float = A
) -> list[Point]:
    """Points of one value each, of E + amount x^-ALPHA with log-normal noise."""
    generator = np.random.default_rng(rng)
    y = E + amount * x**-ALPHA
    return [
        Point(f"{i}", np.array([a]), b * np.exp(noise * generator.normal(size=(seeds, 1))))
        for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]


def test_exact_data_give_the_law_back() -> None:
    fitted = law(synthetic_points(), frontier=False)
    assert fitted["identified"]
    np.testing.assert_allclose([fitted["E"], fitted["A"], fitted["alpha"]], [E, A, ALPHA], rtol=1e-6)
    assert fitted["held_out"]["left_out"] == ["10", "11"]
    assert fitted["held_out"]["mean_error"] < 1e-6
    assert (fitted["points"], fitted["runs"]) == (12, 12)


def test_exact_data_without_an_irreducible_term() -> None:
    points = [Point("", p.x, p.y - E) for p in synthetic_points()]
    fitted = law(points, frontier=False)
    np.testing.assert_allclose([fitted["alpha"], fitted["slope"]], ALPHA, rtol=1e-4)
    assert fitted["E"] < 0.02


@pytest.mark.parametrize("rng", [0, 1, 2])
def test_the_fit_is_the_optimum_that_scipy_finds(rng: int) -> None:
    points = synthetic_points(0.05, rng=rng)
    x, y = (np.array([getattr(p, name).mean() for p in points]) for name in "xy")
    fast = fit([(x, y)])
    u = np.log(x) - fast.centre

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.log(y) - np.logaddexp(theta[0] - theta[1] * u, theta[2])

    starts = ([4.0, 0.3, 3.0], [4.0, 0.8, 3.0], [4.0, 0.3, -4.0])
    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14}
    fits = [least_squares(residuals, s, loss="huber", f_scale=fast.delta, **tight) for s in starts]
    reference = min(fits, key=lambda f: f.cost)
    np.testing.assert_allclose(predict(fast, x)[0], y / np.exp(residuals(reference.x)), rtol=1e-5)
    np.testing.assert_allclose(fast.theta[0], reference.x, rtol=2e-3)


def test_one_wild_point_does_not_bend_the_law() -> None:
    points = synthetic_points(0.01)
    points[5] = Point("5", points[5].x, points[5].y * 3)
    assert abs(law(points, frontier=False)["alpha"] - ALPHA) < 0.06


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_intervals_cover_the_truth(seeds: int) -> None:
    """A 90% interval misses one in ten: of 25, fewer than 19 hits has a chance below 1 in 100."""
    laws = [law(synthetic_points(0.04, seeds, rng), frontier=False, resamples=80) for rng in range(25)]
    hits = [low <= ALPHA <= high for low, high in (t["alpha_interval"] for t in laws)]
    assert sum(hits) >= 19
    assert all(t["identified"] for t in laws)
    widths = [t["alpha_interval"][1] - t["alpha_interval"][0] for t in laws]
    assert np.median(widths) < 0.25


def test_noise_alone_is_not_identified() -> None:
    laws = [
        law(synthetic_points(0.1, rng=rng, amount=0.0), frontier=False, resamples=100) for rng in range(8)
    ]
    assert not any(fitted["identified"] for fitted in laws)
    assert all("not identified" in describe(fitted) for fitted in laws)
    for fitted in laws:
        assert ("which includes 0" in fitted["reason"]) == (fitted["alpha_interval"][0] <= 0)
    assert any("which includes 0" in fitted["reason"] for fitted in laws)


def test_too_narrow_a_range_is_not_identified() -> None:
    fitted = law(synthetic_points(0.05, x=np.geomspace(0.01, 0.02, 8)), frontier=False, resamples=100)
    assert not fitted["identified"]


def test_few_points_say_so() -> None:
    fitted = law(synthetic_points()[:4], frontier=False)
    assert not fitted["identified"]
    assert fitted["reason"] == "4 different x for three parameters; at least 5 are needed"
    assert law([], frontier=True)["reason"].startswith("0 frontier points")
    five = law(synthetic_points()[:5], frontier=False)
    assert five["identified"]
    assert "fewer than 5 points remain" in five["held_out"]["reason"]


def test_held_out_error_tells_a_law_that_breaks() -> None:
    points = synthetic_points(0.01)
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
    fitted = law(points, frontier=True, resamples=100)
    assert fitted["identified"]
    low, high = fitted["alpha_interval"]
    assert abs(fitted["alpha"] - 0.25) < 0.03
    assert low < 0.27 and high > 0.23
    assert abs(fitted["E"] - 0.1) < 0.02


def test_spearman() -> None:
    assert spearman(synthetic_points()) == pytest.approx(-1.0)
    assert spearman(synthetic_points()[:2]) is None


def test_a_study_folder(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, seeds=(0, 1), noise=0.02, law=(E, A, ALPHA))
    fitted = fit_laws(results.read(root))
    assert fitted["fitted"] == "fd_mnist"
    assert fitted["gmacs"]["points"] == 12
    assert fitted["gmacs"]["runs"] == 24
    low, high = fitted["gmacs"]["alpha_interval"]
    assert low < ALPHA < high
    assert fitted["spearman"] < -0.95
    assert fitted["train_flops"]["identified"]
    assert fitted["train_flops"]["held_out"]["predictions"]


def test_an_accuracy_is_fitted_as_an_error(make_study: Callable[..., Path], tmp_path: Path) -> None:
    root = make_study(tmp_path, metric="val_top1", law=(0.02, 0.004, 0.5), noise=0.02)
    fitted = fit_laws(results.read(root))
    assert fitted["fitted"] == "1 - val_top1"
    assert abs(fitted["gmacs"]["alpha"] - 0.5) < 0.08
    assert fitted["spearman"] < -0.95
