"""`scaling law FILE.csv`: the law of anybody's table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling.errors import UserError
from scaling.laws.belief import Belief, as_json, believe, correlations, summary
from scaling.laws.optimal import optimal
from scaling.laws.values import of_table, require_columns

DEFAULTS = {1: "power", 2: "joint", 3: "repeated"}  # number of quantities -> form


@dataclass(frozen=True)
class Question:
    """The question to a table; see `scaling law --help`."""

    x: Sequence[str]
    y: str
    form: str | None = None
    by: str | None = None
    point: str | None = None
    run: str | None = None
    standard_error: str | None = None
    chance: float | None = None
    at: Sequence[Mapping[str, float]] = ()
    budgets: Sequence[float] = ()
    cost: float = 6.0


def law_of_file(file: Path, question: Question) -> dict[str, Any]:
    """Returns the law of a CSV file's values, or with `by`, one for each group of rows, under `groups`.

    Raises:
        UserError: if the file cannot be read, lacks a column, or has too few values for the form.
    """
    table = _read(file)
    if question.by is None:
        return _law(table, question)
    require_columns(table, [question.by])
    groups = {}
    for name, rows in table.groupby(question.by, sort=False):
        try:
            groups[str(name)] = _law(rows, question)
        except UserError as e:
            groups[str(name)] = {"error": str(e)}
    if all("error" in group for group in groups.values()):
        raise UserError(f"{question.by}: no group has a law; {next(iter(groups.values()))['error']}")
    return {"by": question.by, "groups": groups}


def _read(file: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(file)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
    except (ValueError, pd.errors.ParserError) as e:
        raise UserError(f"{file}: is no CSV table ({' '.join(str(e).split())})") from None


def _law(table: pd.DataFrame, question: Question) -> dict[str, Any]:
    values = of_table(table, question.x, question.y, question.point, question.run, question.standard_error)
    belief = believe(values, _form(question), question.chance)
    law = {**as_json(belief), **correlations(values.x, values.y)}
    if question.at:
        law["predictions"] = [_predict(belief, point) for point in question.at]
    if question.budgets:
        law["optimal"] = _optimal(belief, np.array(question.budgets), question.cost)
    return law


def _form(question: Question) -> str:
    form = question.form or DEFAULTS.get(len(question.x))
    if form is None:
        raise UserError(f"x={','.join(question.x)}: no form takes {len(question.x)} quantities; give 1 to 3")
    return form


def _predict(belief: Belief, point: Mapping[str, float]) -> dict[str, Any]:
    names = belief.values.names
    if set(point) != set(names):
        raise UserError(f"at={','.join(point)}: must give {', '.join(names)}")
    draws = belief.runs(np.array([[point[name] for name in names]]))[:, 0]
    return {"at": dict(point), **summary(draws)}


def _optimal(belief: Belief, budgets: np.ndarray, cost: float) -> dict[str, Any]:
    frontier = optimal(belief, budgets, cost)
    return {
        "cost": cost,
        "exponents": {name: summary(draws) for name, draws in frontier.exponents.items()},
        "budgets": [
            {"budget": float(budget)}
            | {
                name: summary(draws[:, i])
                for name, draws in zip(
                    (*belief.values.names, "y"), (frontier.size, frontier.data, frontier.y), strict=True
                )
            }
            for i, budget in enumerate(budgets)
        ],
    }


def text(law: Mapping[str, Any]) -> str:
    """Returns a law, or those of groups, as lines to read."""
    if "groups" in law:
        return "\n\n".join(f"{law['by']} {name}\n{text(each)}" for name, each in law["groups"].items())
    if "error" in law:
        return f"  no law: {law['error']}"
    lines = [f"{law['form']}: {law['formula']}, {law['values']} values of {', '.join(law['x'])}"]
    for name, value in law["parameters"].items():
        low, high = law["intervals"][name]
        lines.append(f"  {name:<12} {value:<10.4g} {law['interval']:.0%}: {low:.4g} to {high:.4g}")
    lines += [f"  {name} spread by {spread:.2%}" for name, spread in law["spreads"].items()]
    if len(law["lack_of_fit"]) > 1:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in law["lack_of_fit"].items())
        lines.append(f"  weights of forms: {weights}{'; the values refute this form' * law['refuted']}")
    if law["spearman"] is not None:
        lines.append(
            f"  correlation of logarithms: {law['pearson']:.3f} (Pearson), {law['spearman']:.3f} (ranks)"
        )
    for each in law.get("predictions", ()):
        at = ", ".join(f"{name}={value:.4g}" for name, value in each["at"].items())
        lines.append(f"  at {at}: {each['value']:.4g}, a run lies in {each['low']:.4g} to {each['high']:.4g}")
    lines += _optimal_lines(law.get("optimal"))
    for title in ("wild", "notes", "left_out"):
        lines += [f"  {title.replace('_', ' ').removesuffix('s')}: {text}" for text in law[title]]
    return "\n".join(lines)


def _optimal_lines(frontier: Mapping[str, Any] | None) -> list[str]:
    if frontier is None:
        return []
    each = [
        f"{k} {v['value']:.3f} ({v['low']:.3f} to {v['high']:.3f})" for k, v in frontier["exponents"].items()
    ]
    lines = [f"  compute-optimal exponents: {', '.join(each)}"]
    for row in frontier["budgets"]:
        parts = [
            f"{k} {v['value']:.4g} ({v['low']:.4g} to {v['high']:.4g})"
            for k, v in row.items()
            if k != "budget"
        ]
        lines.append(f"  with {row['budget']:.4g}: {', '.join(parts)}")
    return lines
