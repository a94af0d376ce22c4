"""Power laws with an irreducible term, y = E + A x^-alpha, and how far they can be trusted.

Fitted to the logarithm of the metric with a Huber loss from many starts, as in Hoffmann et al. 2022,
section 3.3 (eq. 3 and D.2); here delta follows the spread of the residuals. Intervals come from
resampling points (configurations), and seeds within a point, with replacement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from scaling.study.results import StudyFolder, point_label
from scaling.study.solve import Fits, fit, predict
from scaling.study.sweep import is_seed

Array = NDArray[np.float64]

INTERVAL = 0.9
PERCENT = f"{INTERVAL:.0%}"
RESAMPLES = 400
FEWEST_POINTS = 5  # distinct x, for three parameters
WIDEST = 4.0  # an exponent known to no better than this ratio (upper to lower end) is not identified
HELD_OUT = 0.2  # of the points, the largest
CURVE_POINTS = 60


@dataclass(frozen=True)
class Point:
    """One configuration: `x` [T] ascending and `y` [seeds, T], NaN where a seed has no value."""

    label: str
    x: Array
    y: Array


def fit_laws(folder: StudyFolder) -> dict[str, Any]:
    """The laws of a study, as `laws.json` has them.

    Returns:
        `metric`; `fitted`, which is the metric or `1 - metric`; `spearman` of log gmacs and log metric at
        the last step; and the laws `gmacs` (at the last step) and `train_flops` (on the frontier).
    """
    data, fitted = objective(folder)
    last = points(folder, data, "gmacs")
    curves = points(folder, data, "train_flops")
    return {
        "metric": folder.study["metric"],
        "fitted": fitted,
        "formula": f"{fitted} = E + A * x^-alpha",
        "interval": INTERVAL,
        "spearman": spearman(last),
        "gmacs": law(last, frontier=False),
        "train_flops": law(curves, frontier=True),
    }


def objective(folder: StudyFolder) -> tuple[pd.DataFrame, str]:
    """The table with a column `y`, lower is better, and that column's name in words.

    An accuracy is turned into its error, 1 - accuracy. Values that have no logarithm are left out.
    """
    metric, table = folder.study["metric"], folder.table
    lower = folder.study["lower_is_better"]
    name = metric if lower else f"1 - {metric}"
    if metric not in table:
        return table.assign(y=np.nan).iloc[:0], name
    y = table[metric] if lower else 1.0 - table[metric]
    table = table.assign(y=y.astype(float))
    return table[np.isfinite(table.y) & (table.y > 0)], name


def points(folder: StudyFolder, data: pd.DataFrame, x: str) -> list[Point]:
    """The configurations of a study, smallest first: done runs at their last step against `gmacs`, or
    every run at every step against `train_flops`. Seeds of one configuration are one point.
    """
    if x == "gmacs":
        data = data[data.run.isin(folder.done())]
        data = data.loc[data.groupby("run")["step"].idxmax()] if len(data) else data
    data = data[data[x] > 0]
    keys = [key for key in folder.swept if not is_seed(key)]
    groups = data.groupby(keys, dropna=False, sort=False) if keys else [((), data)] if len(data) else []
    made = []
    for values, group in groups:
        grid = group.pivot_table(index="run", columns=x, values="y", aggfunc="mean")
        label = point_label(dict(zip(keys, values, strict=True)))
        made.append(Point(label, grid.columns.to_numpy(float), grid.to_numpy(float)))
    return sorted(made, key=lambda p: float(p.x[-1]))


def spearman(last: Sequence[Point]) -> float | None:
    """Rank correlation of log x and log y over points (seeds averaged), or None if it is not defined."""
    x, y, _ = _gathered(last, frontier=False)
    if len(np.unique(x)) < 3 or len(np.unique(y)) < 2:
        return None
    return float(spearmanr(np.log(x), np.log(y)).statistic)


def law(chosen: Sequence[Point], frontier: bool, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Fits one law.

    Args:
        chosen: the configurations.
        frontier: fit the lower envelope of all their curves instead of every value.

    Returns:
        `identified` and, if not, the `reason`; `E`, `A`, `alpha`; `slope`, the exponent of a pure power law
        (no irreducible term), which says how the metric falls within the range tested; for each of the
        last four (but A) `NAME_interval`; `curve` with `x`, `y`, `low`, `high`; `held_out`.
    """
    x, y, _ = _gathered(chosen, frontier)
    found: dict[str, Any] = {
        "identified": False, "reason": None, "points": len(x), "runs": int(sum(len(p.y) for p in chosen)),
    }  # fmt: skip
    distinct = len(np.unique(x))
    if distinct < FEWEST_POINTS:
        what = "frontier points" if frontier else "different x"
        found["reason"] = f"{distinct} {what} for three parameters; at least {FEWEST_POINTS} are needed"
        return found
    best, drawn = _fitted(x, y, chosen, frontier, resamples, seed)
    grid = np.geomspace(x.min(), x.max(), CURVE_POINTS)
    curves = predict(drawn, grid)
    low, high = _interval(curves)
    found |= {
        "E": float(_floor(best.E, y)[0]), "A": float(best.A[0]),
        "alpha": float(best.alpha[0]), "slope": float(best.slope[0]),
        "E_interval": _interval(_floor(drawn.E, y)), "alpha_interval": _interval(drawn.alpha),
        "slope_interval": _interval(drawn.slope),
        "curve": {"x": grid.tolist(), "y": predict(best, grid)[0].tolist(), "low": low, "high": high},
    }  # fmt: skip
    found["reason"] = _unidentified(*found["alpha_interval"])
    found["identified"] = found["reason"] is None
    found["held_out"] = _held_out(chosen, frontier, resamples, seed)
    return found


def _unidentified(low: float, high: float) -> str | None:
    """Why an exponent with this interval cannot be told, or None if it can."""
    span = f"{PERCENT} interval {low:.2g} to {high:.2g}"
    if low <= 0:
        return f"{span}, which includes 0"
    if high > WIDEST * low:
        return f"{span}, wider than a factor of {WIDEST:g}"
    return None


def _floor(E: Array, y: Array) -> Array:
    """Irreducible terms, 0 where they are too small to be seen in any y."""
    return np.where(E / y.min() < 1e-4, 0.0, E)


def _interval(values: Array) -> list[Any]:
    tail = 50 * (1 - INTERVAL)
    return np.percentile(values, [tail, 100 - tail], axis=0).tolist()


# --- points, frontiers and resampling ------------------------------------------------------------


def _gathered(
    chosen: Sequence[Point], frontier: bool, rng: np.random.Generator | None = None
) -> tuple[Array, Array, NDArray[np.int64]]:
    """x, y and the point of each value, [N]: seed means; with `rng`, of seeds drawn with replacement."""
    xs, ys, owners = [np.empty(0)], [np.empty(0)], [np.empty(0, int)]
    for i, point in enumerate(chosen):
        y = point.y if rng is None else point.y[rng.integers(len(point.y), size=len(point.y))]
        count = np.isfinite(y).sum(0)
        xs.append(point.x[count > 0])
        ys.append(np.nansum(y, 0)[count > 0] / count[count > 0])
        owners.append(np.full(len(xs[-1]), i))
    x, y, owner = np.concatenate(xs), np.concatenate(ys), np.concatenate(owners)
    kept = envelope(x, y) if frontier else np.arange(len(x))
    return x[kept], y[kept], owner[kept]


def envelope(x: Array, y: Array) -> NDArray[np.int64]:
    """Which values [M] make the lower envelope, by x: those that nothing at a smaller or equal x reaches."""
    order = np.lexsort((y, x))
    lowest = np.concatenate([[np.inf], np.minimum.accumulate(y[order])[:-1]])
    return order[y[order] < lowest]


def _fitted(
    x: Array, y: Array, chosen: Sequence[Point], frontier: bool, resamples: int, seed: int
) -> tuple[Fits, Fits]:
    """The fit to all points, and one to each resample that has enough different x.

    A resample draws seeds within each point, then points. On the frontier the points that lie on it are
    drawn, each with all its steps there: leaving points out first would only ever raise the envelope.
    """
    best = fit([(x, y)])
    rng = np.random.default_rng(seed)
    draws: list[tuple[Array, Array]] = []
    for _ in range(20 * resamples):
        all_x, all_y, owner = _gathered(chosen, frontier, rng)
        present = np.unique(owner)
        rows = np.concatenate([np.flatnonzero(owner == i) for i in rng.choice(present, len(present))])
        if len(np.unique(all_x[rows])) >= FEWEST_POINTS - 1:
            draws.append((all_x[rows], all_y[rows]))
        if len(draws) == resamples:
            break
    return best, fit(draws or [(x, y)], near=best)


def _held_out(chosen: Sequence[Point], frontier: bool, resamples: int, seed: int) -> dict[str, Any]:
    """Refits without the largest points and predicts them.

    Returns:
        `left_out` (labels), `predictions` of x, actual, predicted, interval and relative error
        ((predicted - actual) / actual), and their `mean_error` (absolute); or only the `reason` why not.
    """
    count = max(1, round(HELD_OUT * len(chosen)))
    rest, largest = chosen[:-count], chosen[-count:]
    x, y, _ = _gathered(rest, frontier)
    if len(np.unique(x)) < FEWEST_POINTS:
        return {"reason": f"fewer than {FEWEST_POINTS} points remain without the largest"}
    all_x, all_y, _ = _gathered(chosen, frontier)
    beyond = all_x > x.max()
    if not beyond.any():
        return {"reason": "the largest runs add nothing beyond the others"}
    best, drawn = _fitted(x, y, rest, frontier, resamples, seed)
    predicted, (low, high) = predict(best, all_x[beyond])[0], _interval(predict(drawn, all_x[beyond]))
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


def describe(found: Mapping[str, Any]) -> str:
    """A law in one line, such as `exponent 0.31 (90%: 0.25 to 0.4), E = 12`."""
    if not found["identified"]:
        return f"exponent not identified: {found['reason']}"
    low, high = found["alpha_interval"]
    return f"exponent {found['alpha']:.2g} ({PERCENT}: {low:.2g} to {high:.2g}), E = {found['E']:.3g}"
