"""The metric of a study, and the y of its laws: positive, and better the lower it is."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from scaling.errors import UserError
from scaling.metrics.kinds import FLOOR, HIGHER, KINDS, STANDARD_ERROR, kind_of
from scaling.validation import parse_dataclass

DIRECTIONS = ("lower", "higher")
V = TypeVar("V", float, Any)  # a number, or an array or column of them


@dataclass(frozen=True)
class Metric:
    """A metric and what is known of it. Its name alone will do where the name says the rest.

    Args:
        name: a name among the evaluation's values, such as `fd_mnist` or `val_top1`.
        kind: `loss`; `share`, between 0 and 1; `distance` from real data; or `score`, any other.
        chance: the value of a model that has learnt nothing, where it is known.
        floor: the best value that there can be, where it is known: the entropy of data, the accuracy that
            wrong labels allow. Of negative losses and scores, the value from which they are counted.
        direction: `lower` or `higher`, whichever is better (default: higher for shares and scores).

    Raises:
        UserError: if the kind is neither given nor known, or the values contradict each other.
    """

    name: str
    kind: str = ""
    chance: float | None = None
    floor: float | None = None
    direction: str = ""

    def __post_init__(self) -> None:
        kind = self.kind or kind_of(self.name)
        if kind is None:
            raise UserError(
                f"metric {self.name!r}: give its kind, Metric({self.name!r}, kind=...), one of "
                f"{', '.join(KINDS)}; the name does not say"
            )
        direction = self.direction or DIRECTIONS[kind in HIGHER]
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "direction", direction)
        for key, value, allowed in (("kind", kind, KINDS), ("direction", direction, DIRECTIONS)):
            if value not in allowed:
                raise UserError(f"metric {self.name!r}: {key}={value!r}: must be one of {', '.join(allowed)}")
        for key, number in (("chance", self.chance), ("floor", self.floor)):
            if number is not None and not math.isfinite(number):
                raise UserError(f"metric {self.name!r}: {key}={number}: must be a finite number")
            if number is not None and kind == "share" and not 0 <= number <= 1:
                raise UserError(f"metric {self.name!r}: {key}={number}: is a share, between 0 and 1")
        if self.chance is not None and self.floor is not None:
            worse = self.chance > self.floor if self.lower else self.chance < self.floor
            if not worse:
                raise UserError(
                    f"metric {self.name!r}: chance={self.chance}: must be worse than floor={self.floor}"
                )

    @property
    def lower(self) -> bool:
        """Whether lower is better."""
        return self.direction == "lower"

    @property
    def standard_error(self) -> str:
        """The name of the column of the metric's standard errors, where evaluators write them."""
        return f"{self.name}{STANDARD_ERROR}"

    @property
    def measured_floor(self) -> str:
        """The name of the column of the metric of real data against real data."""
        return f"{self.name}{FLOOR}"

    @property
    def _best(self) -> float | None:
        """The value from which y is counted, if not from 0."""
        if self.lower:
            return self.floor if self.floor is not None and self.floor < 0 else None
        return 1.0 if self.kind == "share" else self.floor

    @property
    def label(self) -> str:
        """The name of y, such as `fd_mnist`, `1 - val_top1`, `1 / val_psnr`."""
        if self._best is None:
            return self.name if self.lower else f"1 / {self.name}"
        return f"{self.name} + {-self._best:g}" if self.lower else f"{self._best:g} - {self.name}"

    def y(self, value: V) -> V:
        """Returns y of a value of the metric."""
        if self._best is None:
            return value if self.lower else 1.0 / value
        return value - self._best if self.lower else self._best - value

    def value(self, y: V) -> V:
        """Returns the value of the metric that has this y."""
        return y + self._best if self.lower and self._best is not None else self.y(y)

    def error(self, value: V, error: V) -> V:
        """Returns the standard error of y, given a value of the metric and its standard error."""
        return error / value**2 if self._best is None and not self.lower else error

    @property
    def y_chance(self) -> float | None:
        """The y of a model that has learnt nothing, where it is known."""
        return None if self.chance is None else self.y(self.chance)

    @property
    def y_floor(self) -> float | None:
        """The smallest y that there can be, where that is known and not 0."""
        if self.floor is None or self.floor == self._best:
            return None
        return self.y(self.floor) or None

    def as_json(self) -> dict[str, Any]:
        """Returns the metric as `study.json` holds it."""
        return asdict(self)


def metric_of(stored: str | Mapping[str, Any], lower_is_better: bool | None = None) -> Metric:
    """Returns the metric of a `study.json`, which in older ones is a name and its direction.

    Raises:
        UserError: if it is none.
    """
    if isinstance(stored, str):
        if lower_is_better is None:
            return Metric(stored)
        kind = kind_of(stored) or ("loss" if lower_is_better else "share")
        return Metric(stored, kind, direction=DIRECTIONS[not lower_is_better])
    return parse_dataclass(Metric, stored, "metric")
