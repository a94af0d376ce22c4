"""The sampler against answers that are known, and the noise's likelihood against SciPy's."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from scaling.laws import noise
from scaling.laws.noise import Levels
from scaling.laws.posterior import sample


def test_a_normal_likelihood_gives_the_posterior_and_the_evidence_that_are_known() -> None:
    observed, spread = np.array([1.5, -0.5, 3.0]), 0.3
    z, log_evidence = sample(
        lambda z: -0.5 * (((observed - z) / spread) ** 2 + np.log(2 * np.pi * spread**2)).sum(1), 3, 4000,
        np.random.default_rng(0),
    )  # fmt: skip
    variance = spread**2 / (1 + spread**2)
    np.testing.assert_allclose(z.mean(0), observed / (1 + spread**2), atol=0.02)
    np.testing.assert_allclose(np.cov(z, rowvar=False), variance * np.eye(3), atol=0.01)
    exact = multivariate_normal(np.zeros(3), (1 + spread**2) * np.eye(3)).logpdf(observed)
    assert log_evidence == pytest.approx(exact, abs=0.15)


def test_separate_modes_are_both_found() -> None:
    z, _ = sample(lambda z: -0.5 * ((abs(z[:, 0]) - 2) / 0.05) ** 2, 1, 2000, np.random.default_rng(0))
    assert 0.4 < (z[:, 0] > 0).mean() < 0.6
    np.testing.assert_allclose(abs(z[:, 0]).mean(), 2, atol=0.02)


POINTS = ["a", "a", "a", "a", "b", "b", "b"]
RUNS = ["a0", "a0", "a1", "a1", "b0", "b1", "b1"]


@pytest.mark.parametrize(
    ("points", "runs", "names"),
    [
        (POINTS, RUNS, ("configurations", "seeds", "values")),
        (POINTS, list("0123456"), ("configurations", "seeds")),
        (POINTS, POINTS, ("configurations", "values")),
        (list("abcdefg"), list("abcdefg"), ("configurations",)),
    ],
)
def test_the_likelihood_is_that_of_the_covariance(
    points: list[str], runs: list[str], names: tuple[str, ...]
) -> None:
    known = np.array([0.0, 0.1, 0.0, 0.2, 0.1, 0.0, 0.3])
    levels = Levels.of(points, runs, known)
    assert levels.spreads == names
    spread = {name: np.array([0.4, 1.1]) / (i + 1) for i, name in enumerate(names)}
    residual = np.random.default_rng(0).normal(size=(2, 7))
    for i in range(2):
        covariance = np.diag(spread[names[-1]][i] ** 2 + known**2)
        for name, owners in (("configurations", points), ("seeds", runs)):
            if name in names[:-1]:
                covariance += spread[name][i] ** 2 * np.equal.outer(owners, owners)
        expected = 0.0
        for point in set(points):
            rows = np.flatnonzero([each == point for each in points])
            block = covariance[np.ix_(rows, rows)]
            densities = [
                multivariate_normal(cov=c * block).pdf(residual[i, rows]) for c in (1, noise.TIMES**2)
            ]
            expected += np.log((1 - noise.WILD) * densities[0] + noise.WILD * densities[1])
        assert noise.log_likelihood(residual, spread, levels)[i] == pytest.approx(expected)


@pytest.mark.parametrize("runs", [list("01234567"), list("00000111"), list("00112234")])
def test_values_that_differ_by_the_finest_noise_alone_are_one_without_changing_the_likelihood(
    runs: list[str],
) -> None:
    rng, known = np.random.default_rng(0), np.array([0, 0, 0, 0.2, 0, 0, 0, 0])
    x, v = np.array([[1.0], [1], [1], [1], [2], [2], [2], [3]]), rng.normal(size=8)
    levels = Levels.of(list("aaaaabbb") if runs[4] == "0" else list("aaaabbbc"), runs, known)
    merged, at, means = levels.merged(x, v)
    assert len(means) < len(v)
    spread = {name: np.array([0.3, 0.1]) / (i + 1) for i, name in enumerate(levels.spreads)}
    whole, less = (
        noise.log_likelihood(values + np.array([[0.1], [0.2]]) * place[:, 0], spread, each)
        for values, place, each in ((v, x, levels), (means, at, merged))
    )
    np.testing.assert_allclose(whole, less)


def test_a_wild_configuration_is_told() -> None:
    levels = Levels.of(range(5), range(5), np.zeros(5))
    residual = np.array([[0.01, -0.01, 0.5, 0.02, 0.0]])
    likely = noise.wildness(residual, {"configurations": np.array([0.02])}, levels)
    assert (likely > 0.5).tolist() == [False, False, True, False, False]
