"""The noise around a law: of configurations, of the seeds of one, and of the values of one run.

log y = log f(x) + configuration + run + value, each normal with a spread of its own, where the data can tell
them apart. Values of one configuration therefore share what they owe to it. A configuration is wild with a
small probability, its spreads then five times as large, so that one that went wrong does not bend a law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Spreads = dict[str, Array]  # each [P]

FINEST, COARSER = 0.05, 0.015  # median of the finest spread and of the others, in log y
SPREAD = 1.2  # standard deviation of a spread's logarithm
WILD, TIMES = 0.05, 5.0  # probability that a configuration is wild, and how many times its spreads then are


@dataclass(frozen=True)
class Levels:
    """Where the values [N] come from, and which spreads can be told apart.

    Attributes:
        run: index of each value's run [N].
        point: index of each run's configuration [R].
        known: each value's known standard error in log y [N], 0 where there is none.
        spreads: names of the spreads that are estimated, from coarse to fine: `configurations`, then `seeds`
            and `values` where there are several in one.
        count: the number of values that each stands for [N], of which it is the mean; see `merged`.
        within: the sum of their squared differences from it [N].
    """

    run: Indices
    point: Indices
    known: Array
    spreads: tuple[str, ...]
    count: Array
    within: Array

    @classmethod
    def of(cls, points: Sequence[object], runs: Sequence[object], known: Array) -> "Levels":
        """Returns the levels of values with these names of configurations and runs, each [N]."""
        _, first, run = np.unique(
            np.asarray(runs, object).astype(str), return_index=True, return_inverse=True
        )
        _, of_value = np.unique(np.asarray(points, object).astype(str), return_inverse=True)
        point = of_value[first]
        several = [("configurations", True)]
        several += [
            ("seeds", len(first) > len(np.unique(point))),
            ("values", len(run) > len(first)),
        ]
        names = tuple(name for name, told in several if told)
        return cls(run, point, known, names, np.ones(len(run)), np.zeros(len(run)))

    @cached_property
    def of_runs(self) -> Array | None:
        """Which values [N] are of each run [R]."""
        return _members(self.run)

    @cached_property
    def of_points(self) -> Array | None:
        """Which runs [R] are of each configuration [C]."""
        return _members(self.point)

    def merged(self, x: Array, v: Array) -> tuple["Levels", Array, Array]:
        """Returns levels, x [M, K] and log y [M] in which values that differ by the finest noise are one.

        These are seeds of one configuration, or values of one run, at one x, without a known error: their
        mean and their spread say all.
        """
        owner = {"seeds": self.point[self.run], "values": self.run}.get(self.spreads[-1], np.arange(len(v)))
        alone = np.where(self.known > 0, 1 + np.arange(len(v)), 0)
        key = np.column_stack([owner, alone, x])
        _, first, cell = np.unique(key, axis=0, return_index=True, return_inverse=True)
        count = np.bincount(cell).astype(float)
        mean = np.bincount(cell, v) / count
        within = np.bincount(cell, (v - mean[cell]) ** 2).astype(float)
        points = self.point[self.run][first]
        runs = np.arange(len(first)) if self.spreads[-1] == "seeds" else self.run[first]
        run, place = np.unique(runs, return_index=True)
        levels = Levels(
            np.searchsorted(run, runs), points[place], self.known[first], self.spreads, count, within
        )
        return levels, x[first], mean


def spreads(z: Array, levels: Levels) -> Spreads:
    """Returns the spreads [P] by name, in log y, from coordinates z [P, S]."""
    medians = [COARSER] * (len(levels.spreads) - 1) + [FINEST]
    drawn = np.array(medians) * np.exp(SPREAD * z)
    return {name: drawn[:, i] for i, name in enumerate(levels.spreads)}


def log_likelihood(residual: Array, spread: Spreads, levels: Levels) -> Array:
    """Returns the log-likelihood [P] of residuals in log y [P, N]."""
    usual, wild = _by_configuration(residual, spread, levels)
    return np.logaddexp(usual, wild).sum(1) - 0.5 * levels.count.sum() * np.log(2 * np.pi)


def wildness(residual: Array, spread: Spreads, levels: Levels) -> Array:
    """Returns the probability that each configuration [C] is wild, over residuals in log y [P, N]."""
    usual, wild = _by_configuration(residual, spread, levels)
    return np.exp(wild - np.logaddexp(usual, wild)).mean(0)


def _by_configuration(residual: Array, spread: Spreads, levels: Levels) -> tuple[Array, Array]:
    """Returns the log-densities [P, C] of each configuration's residuals [P, N]: usual, wild; without 2 pi.

    The covariance of a configuration's values is the finest spread on the diagonal, and what the values of
    a run and of a configuration share, which rank-one updates add (Sherman and Morrison).
    """
    variance = spread[levels.spreads[-1]][:, None] ** 2 + levels.known**2  # [P, N]
    ones = levels.count / variance
    second = (levels.count * residual**2 + levels.within) / variance
    sums: tuple[Array, ...] = (ones, residual * ones, second, levels.count * np.log(variance))
    for name, members in (("seeds", levels.of_runs), ("configurations", levels.of_points)):
        if members is not None:
            sums = tuple(each @ members for each in sums)
        if name in levels.spreads[:-1]:
            ones, first, second, logs = sums
            share = spread[name][:, None] ** 2
            factor = 1 + share * ones
            second, logs = second - share * first**2 / factor, logs + np.log(factor)
            sums = (ones / factor, first / factor, second, logs)
    *_, second, logs = sums
    sizes = np.bincount(levels.point[levels.run], levels.count)
    usual = np.log1p(-WILD) - 0.5 * (second + logs)
    wild = np.log(WILD) - 0.5 * (second / TIMES**2 + logs) - sizes * np.log(TIMES)
    return usual, wild


def _members(groups: Indices) -> Array | None:
    """Returns which of N are in each group, [N, groups] of 0 and 1; None if each is a group, in order."""
    count = int(groups.max()) + 1
    return None if np.array_equal(groups, np.arange(count)) else np.eye(count)[groups]
