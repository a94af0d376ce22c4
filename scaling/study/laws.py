"""Power laws with an irreducible term, y = E + A x^-alpha, and how far they can be trusted.

Fitted to the logarithm of the metric with a Huber loss from many starts, as in Hoffmann et al. 2022,
section 3.3 (eq. 3 and D.2); here delta follows the spread of the residuals. Intervals come from
resampling points (configurations), and seeds within a point, with replacement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from scaling.study.power_law_fit import Fits, fit, predict
from scaling.study.results import StudyFolder, point_label
from scaling.study.sweep import is_seed

Array = NDArray[np.float64]

INTERVAL = 0.9  # probability of every interval
PERCENT = f"{INTERVAL:.0%}"
RESAMPLES = 400
FEWEST_POINTS = 5  # minimum number of distinct x, for three parameters
WIDEST = 4.0  # maximum ratio of the ends of an identified exponent's interval
HELD_OUT = 0.2  # fraction of the points, the largest, that a second fit leaves out and predicts
CURVE_POINTS = 60  # number of x at which laws.json has a fitted curve


@dataclass(frozen=True)
class Point:
    """One configuration: `x` [T] ascending and `y` [seeds, T], NaN where a seed has no value."""

    label: str
    x: Array
    y: Array

    @cached_property
    def complete(self) -> bool:
        """Whether every seed has every value."""
        return bool(np.isfinite(self.y).all())


def fit_laws(folder: StudyFolder) -> dict[str, Any]:
    """Fits the laws of a study, as `laws.json` has them.

    Returns:
        `metric`; `fitted`, which is the metric or `1 - metric`; `spearman` of log gmacs and log metric at
        the last step; and the laws `gmacs` (at the last step) and `train_flops` (on the frontier).
    """
    data, name = objective(folder)
    last = points(folder, data, "gmacs")
    curves = points(folder, data, "train_flops")
    return {
        "metric": folder.study["metric"],
        "fitted": name,
        "formula": f"{name} = E + A * x^-alpha",
        "interval": INTERVAL,
        "spearman": spearman(last),
        "gmacs": law(last, frontier=False),
        "train_flops": law(curves, frontier=True),
    }


def objective(folder: StudyFolder) -> tuple[pd.DataFrame, str]:
    """Returns the table with a column `y`, where lower is better, and that column's name in words.

    An accuracy is turned into its error, 1 - accuracy. Values that have no logarithm are left out.
    """
    metric, table = folder.study["metric"], folder.table
    lower = folder.study["lower_is_better"]
    name = metric if lower else f"1 - {metric}"
    if metric not in table:
        return table.assign(y=np.nan).iloc[:0], name
    y = table[metric] if lower else 1.0 - table[metric]
    table = table.assign(y=y.astype(float))[table["gmacs"].notna()]  # a run without a config has no cost
    table = table.astype({"params": np.int64})
    return table[np.isfinite(table.y) & (table.y > 0)], name


def points(folder: StudyFolder, data: pd.DataFrame, x: str) -> list[Point]:
    """Returns the configurations of a study, smallest first. Seeds of one configuration are one point.

    Against `gmacs`, these are the done runs at their last step; against `train_flops`, every run at every
    step.
    """
    if x == "gmacs":
        data = data[data.run.isin(folder.done())]
        data = data.loc[data.groupby("run")["step"].idxmax()] if len(data) else data
    data = data[data[x] > 0]
    keys = [key for key in folder.swept if not is_seed(key)]
    groups = data.groupby(keys, dropna=False, sort=False) if keys else [((), data)] if len(data) else []
    configurations = []
    for values, group in groups:
        grid = group.pivot_table(index="run", columns=x, values="y", aggfunc="mean")
        label = point_label(dict(zip(keys, values, strict=True)))
        configurations.append(Point(label, grid.columns.to_numpy(float), grid.to_numpy(float)))
    return sorted(configurations, key=lambda p: float(p.x[-1]))


def spearman(last: Sequence[Point]) -> float | None:
    """Returns the rank correlation of log x and log y over points (seeds averaged), or None if undefined."""
    x, y, _ = _gather(last, frontier=False)
    if len(np.unique(x)) < 3 or len(np.unique(y)) < 2:
        return None
    return float(spearmanr(np.log(x), np.log(y)).statistic)


def law(
    configurations: Sequence[Point], frontier: bool, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Fits one law.

    Args:
        configurations: the points.
        frontier: fit the lower envelope of all their curves instead of every value.

    Returns:
        `identified` and, if not, the `reason`; `E`, `A`, `alpha`; `slope`, the exponent of a pure power law
        (no irreducible term), which says how the metric falls within the range tested; for each of the
        last four (but A) `NAME_interval`; `curve` with `x`, `y`, `low`, `high`; `held_out`.
    """
    x, y, _ = _gather(configurations, frontier)
    fitted: dict[str, Any] = {
        "identified": False, "reason": None, "points": len(x),
        "runs": int(sum(len(point.y) for point in configurations)),
    }  # fmt: skip
    distinct = len(np.unique(x))
    if distinct < FEWEST_POINTS:
        what = "frontier points" if frontier else "different x"
        fitted["reason"] = f"{distinct} {what} for three parameters; at least {FEWEST_POINTS} are needed"
        return fitted
    best, resampled = _fit_resampled(x, y, configurations, frontier, resamples, seed)
    grid = np.geomspace(x.min(), x.max(), CURVE_POINTS)
    curves = predict(resampled, grid)
    low, high = _interval(curves)
    fitted |= {
        "E": float(_floor(best.E, y)[0]), "A": float(best.A[0]),
        "alpha": float(best.alpha[0]), "slope": float(best.slope[0]),
        "E_interval": _interval(_floor(resampled.E, y)), "alpha_interval": _interval(resampled.alpha),
        "slope_interval": _interval(resampled.slope),
        "curve": {"x": grid.tolist(), "y": predict(best, grid)[0].tolist(), "low": low, "high": high},
    }  # fmt: skip
    fitted["reason"] = _unidentified(*fitted["alpha_interval"])
    fitted["identified"] = fitted["reason"] is None
    fitted["held_out"] = _held_out(configurations, frontier, resamples, seed)
    return fitted


def _unidentified(low: float, high: float) -> str | None:
    """Returns why an exponent with this interval is not identified, or None if it is."""
    span = f"{PERCENT} interval {low:.2g} to {high:.2g}"
    if low <= 0:
        return f"{span}, which includes 0"
    if high > WIDEST * low:
        return f"{span}, wider than a factor of {WIDEST:g}"
    return None


def _floor(E: Array, y: Array) -> Array:
    """Returns irreducible terms, 0 where they are too small to be seen in any y."""
    return np.where(E / y.min() < 1e-4, 0.0, E)


def _interval(values: Array) -> list[Any]:
    tail = 50 * (1 - INTERVAL)
    return np.percentile(values, [tail, 100 - tail], axis=0).tolist()


# --- points, frontiers and resampling ------------------------------------------------------------


def _gather(
    configurations: Sequence[Point], frontier: bool, rng: np.random.Generator | None = None
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Returns x, y and the index of the point of each value, each [N].

    A value is the mean of its seeds, or, with `rng`, of as many seeds drawn with replacement.
    """
    xs, ys, owners = [np.empty(0)], [np.empty(0)], [np.empty(0, int)]
    for i, point in enumerate(configurations):
        y = point.y if rng is None else point.y[rng.integers(len(point.y), size=len(point.y))]
        if point.complete:  # as a resample of it is, which is most of the work here
            xs.append(point.x)
            ys.append(y.sum(0) / len(y))
        else:
            count = np.isfinite(y).sum(0)
            xs.append(point.x[count > 0])
            ys.append(np.nansum(y, 0)[count > 0] / count[count > 0])
        owners.append(np.full(len(xs[-1]), i))
    x, y, owner = np.concatenate(xs), np.concatenate(ys), np.concatenate(owners)
    kept = envelope(x, y) if frontier else np.arange(len(x))
    return x[kept], y[kept], owner[kept]


def envelope(x: Array, y: Array) -> NDArray[np.int64]:
    """Returns the indices [M] of the lower envelope, by x: no value at a smaller or equal x is as low."""
    order = np.lexsort((y, x))
    lowest = np.concatenate([[np.inf], np.minimum.accumulate(y[order])[:-1]])
    return order[y[order] < lowest]


def _fit_resampled(
    x: Array, y: Array, configurations: Sequence[Point], frontier: bool, resamples: int, seed: int
) -> tuple[Fits, Fits]:
    """Returns the fit to all points, and the fits to the resamples that have enough different x.

    A resample draws seeds within each point, then points. On the frontier the points that lie on it are
    drawn, each with all its steps there: leaving points out first would only ever raise the envelope.
    """
    best = fit([(x, y)])
    rng = np.random.default_rng(seed)
    draws: list[tuple[Array, Array]] = []
    for _ in range(20 * resamples):
        all_x, all_y, owner = _gather(configurations, frontier, rng)
        present = np.unique(owner)
        rows = np.concatenate([np.flatnonzero(owner == i) for i in rng.choice(present, len(present))])
        if len(np.unique(all_x[rows])) >= FEWEST_POINTS - 1:
            draws.append((all_x[rows], all_y[rows]))
        if len(draws) == resamples:
            break
    return best, fit(draws or [(x, y)], near=best)


def _held_out(configurations: Sequence[Point], frontier: bool, resamples: int, seed: int) -> dict[str, Any]:
    """Refits without the largest points and predicts them.

    Returns:
        `left_out` (labels), `predictions` of x, actual, predicted, interval and relative error
        ((predicted - actual) / actual), and their `mean_error` (absolute); or only the `reason` why not.
    """
    count = max(1, round(HELD_OUT * len(configurations)))
    rest, largest = configurations[:-count], configurations[-count:]
    x, y, _ = _gather(rest, frontier)
    if len(np.unique(x)) < FEWEST_POINTS:
        return {"reason": f"fewer than {FEWEST_POINTS} points remain without the largest"}
    all_x, all_y, _ = _gather(configurations, frontier)
    beyond = all_x > x.max()
    if not beyond.any():
        return {"reason": "the largest runs add nothing beyond the others"}
    best, resampled = _fit_resampled(x, y, rest, frontier, resamples, seed)
    predicted, (low, high) = predict(best, all_x[beyond])[0], _interval(predict(resampled, all_x[beyond]))
    errors = predicted / all_y[beyond] - 1
    rows = zip(all_x[beyond], all_y[beyond], predicted, low, high, errors, strict=True)
    return {
        "left_out": [point.label for point in largest],
        "predictions": [
            {"x": float(a), "actual": float(b), "predicted": float(c), "interval": [d, e], "error": float(f)}
            for a, b, c, d, e, f in rows
        ],
        "mean_error": float(np.abs(errors).mean()),
    }


def describe(fitted: Mapping[str, Any]) -> str:
    """Describes a law in one line, such as `exponent 0.31 (90%: 0.25 to 0.4), E = 12`."""
    if not fitted["identified"]:
        return f"exponent not identified: {fitted['reason']}"
    low, high = fitted["alpha_interval"]
    return f"exponent {fitted['alpha']:.2g} ({PERCENT}: {low:.2g} to {high:.2g}), E = {fitted['E']:.3g}"
