"""The Fréchet distance between Gaussians fitted to features, on the host in float64.

A distance is named after the classifier and data that its features come from (`fd_mnist`); only with the
published Inception network is it called "FID".
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from scaling.errors import NotFinite, UserError

GROUPS = 10  # groups of samples, each of which is left out once for the standard error


class GaussianStatistics:
    """Mean and covariance of features that arrive in batches, without cancellation (Chan et al. 1983)."""

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean = np.zeros(features)  # [D]
        self._scatter = np.zeros((features, features))  # [D, D], sum of (x - mean)(x - mean)^T

    def update(self, features: np.ndarray) -> None:
        """Adds rows [N, D] of any float type.

        Raises:
            NotFinite: if any row is not finite.
        """
        rows = np.asarray(features, np.float64)
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows).all(axis=1)).sum())
            raise NotFinite(f"features: {bad} of {len(rows)} rows are not finite")
        if not len(rows):
            return
        mean = rows.mean(axis=0)
        self._add(len(rows), mean, (rows - mean).T @ (rows - mean))

    @classmethod
    def of(cls, parts: "Sequence[GaussianStatistics]") -> "GaussianStatistics":
        """Returns the statistics of all the rows of several."""
        together = cls(len(parts[0].mean))
        for part in parts:
            if part.count:
                together._add(part.count, part.mean, part._scatter)
        return together

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        shift, total = mean - self.mean, self.count + count
        self._scatter = self._scatter + scatter + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """Covariance [D, D], divided by count - 1.

        Raises:
            UserError: if there are fewer than two rows.
        """
        if self.count < 2:
            raise UserError(f"samples={self.count}: a covariance needs at least 2")
        return self._scatter / (self.count - 1)


def require_samples(samples: int, features: int) -> None:
    """Checks that there are ten samples per feature: with fewer, the distance is mostly bias.

    Raises:
        UserError: if there are fewer.
    """
    if samples < 10 * features:
        raise UserError(
            f"samples={samples}: a Fréchet distance on {features} features needs at least {10 * features}"
        )


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Computes |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), in float64.

    Dowson and Landau 1982; Heusel et al. 2017 (arXiv:1706.08500), eq. 6. `mean` [D], `cov` [D, D] symmetric
    and positive semi-definite. The trace of the root is the sum of the singular values of
    cov1^(1/2) cov2^(1/2), each root from a symmetric eigen-decomposition: a root of the product itself loses
    half the digits of the small singular values that nearly singular covariances have.
    """
    values1, vectors1 = np.linalg.eigh(np.asarray(cov1, np.float64))
    values2, vectors2 = np.linalg.eigh(np.asarray(cov2, np.float64))
    roots1, roots2 = np.sqrt(np.maximum(values1, 0.0)), np.sqrt(np.maximum(values2, 0.0))
    root_product = (roots1[:, None] * vectors1.T) @ (vectors2 * roots2)  # [D, D], rotated on both sides
    root_trace = np.linalg.svd(root_product, compute_uv=False).sum()
    shift = np.asarray(mean1, np.float64) - np.asarray(mean2, np.float64)
    return float(max(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2.0 * root_trace, 0.0))


def grouped(rows: np.ndarray, start: int, samples: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the groups of rows `start` and on of so many samples, and the rows [n, D] of each.

    A group is a block of samples that follow each other, in which classes are as balanced as in all.
    """
    group = np.arange(start, start + len(rows)) * GROUPS // samples
    for each in np.unique(group):
        yield int(each), rows[group == each]


def distance_and_error(
    groups: Sequence[GaussianStatistics], mean: np.ndarray, cov: np.ndarray
) -> tuple[float, float]:
    """Returns the distance of all groups from a Gaussian, and its standard error.

    The error is the jackknife's: from the distances without one group each (Efron and Stein 1981).
    """
    together = GaussianStatistics.of(groups)
    distance = frechet_distance(together.mean, together.covariance, mean, cov)
    without = []
    for i in range(len(groups)):
        rest = GaussianStatistics.of([group for j, group in enumerate(groups) if j != i])
        without.append(frechet_distance(rest.mean, rest.covariance, mean, cov))
    spread = np.square(np.array(without) - np.mean(without)).sum()
    return distance, math.sqrt((len(groups) - 1) / len(groups) * spread)
