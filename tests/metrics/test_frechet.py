import numpy as np
import pytest
import scipy.linalg

from scaling.errors import UserError
from scaling.metrics.frechet import (
    GROUPS,
    GaussianStatistics,
    distance_and_error,
    frechet_distance,
    grouped,
    require_samples,
)


def _by_sqrtm(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2.0 * root.real))


def _factor(rng: np.random.Generator, dims: int, kind: str) -> np.ndarray:
    """A with covariance A A^T: of full rank, of a quarter of the rank, or with eigenvalues down to 1e-14."""
    if kind == "full":
        return rng.normal(size=(dims, 2 * dims)) / np.sqrt(dims)
    if kind == "deficient":
        return rng.normal(size=(dims, dims // 4)) / np.sqrt(dims)
    rotation = np.linalg.qr(rng.normal(size=(dims, dims)))[0]
    return rotation * np.sqrt(np.logspace(0, -14, dims))


@pytest.mark.parametrize("dims", [64, 192])
@pytest.mark.parametrize("kind", ["full", "deficient", "tiny"])
def test_agrees_with_sqrtm_and_with_the_exact_value(dims: int, kind: str) -> None:
    rng = np.random.default_rng(dims)
    one, two = _factor(rng, dims, kind), _factor(rng, dims, kind)
    mean1, mean2 = rng.normal(size=(2, dims))
    ours = frechet_distance(mean1, one @ one.T, mean2, two @ two.T)
    assert ours == pytest.approx(_by_sqrtm(mean1, one @ one.T, mean2, two @ two.T), rel=1e-6, abs=1e-6)
    # tr (A A^T B B^T)^(1/2) is the nuclear norm of A^T B: no root of a singular matrix is taken.
    root = np.linalg.svd(one.T @ two, compute_uv=False).sum()
    exact = ((mean1 - mean2) ** 2).sum() + (one**2).sum() + (two**2).sum() - 2.0 * root
    assert ours == pytest.approx(exact, rel=1e-12, abs=1e-11)


@pytest.mark.parametrize("dims", [64, 192])
def test_statistics_of_few_samples_have_a_finite_distance(dims: int) -> None:
    rng = np.random.default_rng(1)
    sets = rng.normal(size=(2, dims // 2, dims)) ** 2  # fewer rows than features: both are singular
    fitted = [GaussianStatistics(dims), GaussianStatistics(dims)]
    for statistics, rows in zip(fitted, sets, strict=True):
        statistics.update(rows)
    one, two = fitted
    moments = (one.mean, one.covariance, two.mean, two.covariance)
    assert frechet_distance(*moments) == pytest.approx(_by_sqrtm(*moments), rel=1e-6)
    swapped = frechet_distance(*moments[2:], *moments[:2])
    assert frechet_distance(*moments) == pytest.approx(swapped, rel=1e-12)
    assert 0.0 <= frechet_distance(*moments[:2], *moments[:2]) < 1e-10


def test_one_dimension_by_hand() -> None:
    one = np.array([[4.0]]), np.array([[9.0]])
    assert frechet_distance(np.array([1.0]), one[0], np.array([3.0]), one[1]) == pytest.approx(4.0 + 1.0)


def test_streamed_statistics_are_numpys() -> None:
    rows = np.random.default_rng(0).normal(size=(103, 8)).astype(np.float32)
    rows += 1000.0  # E[x^2] - E[x]^2 would lose six digits
    statistics = GaussianStatistics(8)
    for start in range(0, 103, 20):
        statistics.update(rows[start : start + 20])
    statistics.update(rows[:0])
    assert statistics.count == 103
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(exact, rowvar=False), rtol=1e-10, atol=1e-12)


def test_bad_input_is_named() -> None:
    statistics = GaussianStatistics(2)
    with pytest.raises(UserError, match=r"^samples=0: "):
        _ = statistics.covariance
    with pytest.raises(UserError, match=r"^features: 1 of 2 rows are not finite"):
        statistics.update(np.array([[1.0, np.nan], [0.0, 0.0]]))
    require_samples(1920, 192)
    with pytest.raises(UserError, match=r"^samples=1919: .*192 features needs at least 1920"):
        require_samples(1919, 192)


def sampled(rows: np.ndarray, batch: int) -> list[GaussianStatistics]:
    groups = [GaussianStatistics(rows.shape[1]) for _ in range(GROUPS)]
    for start in range(0, len(rows), batch):
        for group, part in grouped(rows[start : start + batch], start, len(rows)):
            groups[group].update(part)
    return groups


def test_groups_are_equal_blocks_whatever_the_batches() -> None:
    rows = np.random.default_rng(0).normal(size=(205, 3))
    groups = sampled(rows, 7)
    assert sorted({group.count for group in groups}) == [20, 21] and sum(g.count for g in groups) == 205
    for one, other in zip(groups, sampled(rows, 100), strict=True):
        np.testing.assert_allclose(one.mean, other.mean)
    whole = GaussianStatistics(3)
    whole.update(rows)
    together = GaussianStatistics.of(groups)
    np.testing.assert_allclose(together.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(together.covariance, whole.covariance, rtol=1e-12)
    distance, _ = distance_and_error(groups, np.zeros(3), np.eye(3))
    assert distance == pytest.approx(frechet_distance(whole.mean, whole.covariance, np.zeros(3), np.eye(3)))


def test_the_standard_error_is_how_distances_of_other_samples_scatter() -> None:
    rng = np.random.default_rng(0)
    found = [
        distance_and_error(sampled(1 + rng.normal(size=(400, 8)), 400), np.zeros(8), np.eye(8))
        for _ in range(60)
    ]
    distances, errors = np.array(found).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(distances.std(ddof=1), rel=0.25)
