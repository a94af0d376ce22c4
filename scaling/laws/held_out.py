"""The test of a law on its largest configurations: fitted without them, does it predict them?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.laws.belief import INTERVAL, Belief, believe, interval
from scaling.laws.values import Values

Array = NDArray[np.float64]

SHARE = 0.2  # fraction of the configurations, the largest, that are left out
SURPRISE = 0.02  # probability of as large a miss, below which it refutes the law


@dataclass(frozen=True)
class HeldOut:
    """Configurations [M] that a fit left out, and what it says of them.

    Attributes:
        points: their names.
        x: their quantities [M, K].
        actual: their y [M], the means of their values.
        draws: draws of those means [P, M], given the others.
    """

    points: tuple[str, ...]
    x: Array
    actual: Array
    draws: Array

    @property
    def probability(self) -> float:
        """The probability, by the fit, of a mean of log y as far from its middle as what was measured."""
        below = float((np.log(self.draws).mean(1) < np.log(self.actual).mean()).mean())
        return 2 * min(below, 1 - below)

    def as_json(self) -> dict[str, Any]:
        """Returns the predictions as `laws.json` holds them."""
        low, high = interval(self.draws, INTERVAL)
        value = np.median(self.draws, 0)
        rows = zip(self.points, self.x, self.actual, value, low, high, strict=True)
        return {
            "predictions": [
                {
                    "point": point, "x": x.tolist(), "actual": float(actual), "value": float(middle),
                    "low": float(least), "high": float(most), "error": float(middle / actual - 1),
                }
                for point, x, actual, middle, least, most in rows
            ],
            "probability": self.probability,
        }  # fmt: skip


def held_out(belief: Belief) -> HeldOut | None:
    """Fits a law again without the largest fifth of its configurations, and has it predict them.

    The size of a configuration is the product of its quantities.

    Returns:
        None if too few configurations remain.
    """
    values, span = belief.values, belief.posteriors[0].span
    size = np.log(values.x).sum(1)
    sizes = np.unique(size)
    count = max(1, round(SHARE * len(sizes)))
    if len(sizes) <= count:
        return None
    left = size > sizes[-count - 1]
    chance, floor = (None if end is None else float(np.exp(end)) for end in (span.ceiling, span.floor))
    try:
        rest = believe(values.select(~left), belief.form.name, chance, floor, belief.seed)
    except UserError:
        return None
    points, x, actual, seeds = _means(values.select(left))
    return HeldOut(points, x, actual, rest.runs(x, seeds))


def _means(values: Values) -> tuple[tuple[str, ...], Array, Array, Array]:
    """Returns the name, x, mean y and number of values of each configuration, smallest first."""
    cells: dict[tuple[str, bytes], list[int]] = {}
    for i in np.argsort(np.log(values.x).sum(1), kind="stable"):
        cells.setdefault((values.points[i], values.x[i].tobytes()), []).append(int(i))
    rows = list(cells.values())
    x = np.array([values.x[i[0]] for i in rows])
    actual = np.array([values.y[i].mean() for i in rows])
    return tuple(name for name, _ in cells), x, actual, np.array([float(len(i)) for i in rows])
