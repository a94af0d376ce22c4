"""The values that a law is fitted to, and why others are left out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.laws.noise import Levels

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Values:
    """Values y [N] at quantities x [N, K], all positive, lower being better.

    Attributes:
        names: names of the quantities [K].
        x, y: as above.
        points: the configuration of each value [N].
        runs: the run of each value [N].
        known: the known standard error of each value in log y [N], 0 where there is none.
        left_out: what was left out, and why, a line each.
    """

    names: tuple[str, ...]
    x: Array
    y: Array
    points: tuple[str, ...]
    runs: tuple[str, ...]
    known: Array
    left_out: tuple[str, ...] = ()

    @property
    def levels(self) -> Levels:
        """Where the values come from, for their noise."""
        return Levels.of(self.points, self.runs, self.known)

    def select(self, rows: NDArray[np.bool_]) -> "Values":
        """Returns some of the values."""
        chosen = np.flatnonzero(rows)
        points, runs = ([names[i] for i in chosen] for names in (self.points, self.runs))
        return Values(self.names, self.x[rows], self.y[rows], tuple(points), tuple(runs), self.known[rows])


def of_table(
    table: pd.DataFrame,
    x: Sequence[str],
    y: str,
    point: str | None = None,
    run: str | None = None,
    standard_error: str | None = None,
) -> Values:
    """Returns the values of a table.

    Args:
        table: one row for each value.
        x: the columns of the quantities.
        y: the column of the values.
        point: the column that names configurations; without, rows of equal x are one.
        run: the column that names runs; without, each row is one.
        standard_error: the column of the values' standard errors.

    Raises:
        UserError: if a column is missing or holds no numbers, or no row can be used.
    """
    require_columns(table, [*x, y, *filter(None, (point, run, standard_error))])
    numbers = pd.DataFrame({name: _numbers(table, name) for name in dict.fromkeys([*x, y])})
    usable = ((numbers > 0) & (numbers < np.inf)).all(axis=1)
    left_out = [_reason(index, row) for index, row in numbers[~usable].iterrows()]
    if not usable.any():
        reason = f"; {left_out[0]}" if left_out else ""
        raise UserError(f"{y}: no row has {', '.join(x)} and {y} above 0, which every form needs{reason}")
    numbers, rest = numbers[usable], table[usable]
    error = _numbers(rest, standard_error) if standard_error else np.zeros(len(rest))
    at = numbers[list(x)].to_numpy(float)
    points = rest[point] if point else pd.Series([_label(x, row) for row in at], index=rest.index)
    runs = rest[run] if run else rest.index
    return Values(
        tuple(x), at, numbers[y].to_numpy(float), tuple(map(str, points)), tuple(map(str, runs)),
        np.nan_to_num(np.asarray(error, float)) / numbers[y].to_numpy(float), tuple(left_out),
    )  # fmt: skip


def require_columns(table: pd.DataFrame, columns: Iterable[str]) -> None:
    """Checks that a table has the columns.

    Raises:
        UserError: if it lacks one; it names those that there are.
    """
    for column in columns:
        if column not in table:
            raise UserError(f"column {column!r}: is not in the table; it has {', '.join(map(str, table))}")


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    try:
        return pd.to_numeric(table[column]).astype(float)
    except (ValueError, TypeError) as e:
        raise UserError(f"column {column!r}: must hold numbers ({e})") from None


def _reason(index: object, row: pd.Series) -> str:
    name, value = next((name, value) for name, value in row.items() if not (np.isfinite(value) and value > 0))
    if np.isnan(value):
        return f"row {index}: {name} has no value"
    why = "is infinite" if value > 0 else "has no logarithm"
    return f"row {index}: {name} = {value:g} {why}"


def _label(x: Sequence[str], row: Array) -> str:
    return ", ".join(f"{name}={float(value)!r}" for name, value in zip(x, row, strict=True))
