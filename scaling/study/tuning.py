"""Tuning of a study: a value is chosen on its smallest configurations, and carried on to the others."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from scaling.errors import UserError

Overrides = dict[str, Any]

SMALLEST = re.compile(r"smallest ([1-9]\d*)")


@dataclass(frozen=True)
class Tune:
    """A key whose value is chosen before the study's runs, such as the learning rate.

    Args:
        key: dotted config name.
        values: the values to choose from.
        at: `smallest N`: the number of configurations, those of fewest gmacs, that are trained with each.

    Raises:
        UserError: naming what is wrong.
    """

    key: str
    values: Sequence[Any]
    at: str = "smallest 2"

    def __post_init__(self) -> None:
        if not SMALLEST.fullmatch(self.at):
            raise UserError(f"tune {self.key}: at={self.at!r}: must be 'smallest N', as 'smallest 2'")
        if len(self.values) < 2 or len(set(map(repr, self.values))) < len(self.values):
            raise UserError(f"tune {self.key}: values={self.values!r}: must be at least two different ones")

    @property
    def count(self) -> int:
        """The number of configurations."""
        match = SMALLEST.fullmatch(self.at)
        assert match
        return int(match[1])

    def runs(self, gmacs: Sequence[tuple[Overrides, float]]) -> list[Overrides]:
        """Returns the runs that tune, of one run of each of the sweep's configurations, and its gmacs."""
        smallest = sorted(gmacs, key=lambda each: each[1])[: self.count]
        return [{**overrides, self.key: value} for overrides, _ in smallest for value in self.values]

    def chosen(self, y: Mapping[str, float], runs: Mapping[str, Overrides]) -> Any:
        """Returns the value of the lowest mean log y over the configurations, of those that each has.

        Args:
            y: of each run that has one, by its name.
            runs: the overrides of each run that tunes.

        Raises:
            UserError: if no value was measured in every configuration.
        """
        of_value: dict[str, list[float]] = {repr(value): [] for value in self.values}
        for name, overrides in runs.items():
            if name in y:
                of_value[repr(overrides[self.key])].append(float(np.log(y[name])))
        wanted = len(runs) // len(self.values)
        means = {text: np.mean(logs) for text, logs in of_value.items() if len(logs) == wanted}
        if not means:
            raise UserError(f"tune {self.key}: none of its values was measured in every configuration")
        best = min(means, key=lambda text: means[text])
        return next(value for value in self.values if repr(value) == best)

    def as_json(self) -> dict[str, Any]:
        """Returns the tuning as `study.json` holds it."""
        return {**asdict(self), "values": list(self.values)}
