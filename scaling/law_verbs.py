"""The command line's verbs that ask laws: law."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from scaling.flag_types import path, positive

Verb = Callable[[str, Any, str, str], argparse.ArgumentParser]  # adds a verb: name, function, help, example


def add(verb: Verb) -> None:
    """Adds the verbs."""
    sub = verb(
        "law", _law, "Fit a law to any table of values, and predict: a CSV file with a row for each value.",
        "scaling law runs.csv --x=params,tokens --y=loss --at=params=7e10,tokens=1.4e12\n\n"
        "Every quantity is positive, and y is better the lower it is. Forms of one quantity: power,\n"
        "saturating, broken; of two: joint (a size N and data D), surface; of three: repeated (N, D and the\n"
        "number of unique data). Each has its formula in the answer. Intervals hold 90 %.",
    )  # fmt: skip
    sub.add_argument("file", metavar="FILE.csv", type=path, help="table with a header")
    sub.add_argument("--x", required=True, type=_names, help="columns of the quantities, as params,tokens")
    sub.add_argument("--y", required=True, help="column of the values")
    sub.add_argument("--form", help="form of the law (default: power, joint or repeated, by the number of x)")
    sub.add_argument("--by", metavar="COLUMN", help="fit one law for each value of this column")
    sub.add_argument("--point", metavar="COLUMN", help="configurations (default: rows of equal x are one)")
    sub.add_argument("--run", dest="run_column", metavar="COLUMN", help="runs (default: each row is one)")
    sub.add_argument("--error", metavar="COLUMN", help="known standard errors of the values")
    sub.add_argument("--chance", type=positive, help="y of a model that has learnt nothing")
    sub.add_argument(
        "--at", action="append", default=[], type=_point, metavar="NAME=VALUE,...",
        help="predict a run there; may be given again",
    )  # fmt: skip
    sub.add_argument(
        "--budget", action="append", default=[], type=positive, metavar="C",
        help="of a joint law, the best N and D for C = cost * N * D; may be given again",
    )  # fmt: skip
    sub.add_argument("--cost", type=positive, default=6.0, help="cost per N and D (default: 6, FLOPs)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: must be different names of columns, as params,tokens")
    return names


def _point(text: str) -> dict[str, float]:
    parts = [part.partition("=") for part in text.split(",")]
    if not all(name and sign for name, sign, _ in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: must be values by name, as params=7e10,tokens=1.4e12")
    return {name.strip(): positive(value) for name, _, value in parts}


def _law(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.laws import of_file

    question = of_file.Question(
        x=options.x, y=options.y, form=options.form, by=options.by, point=options.point,
        run=options.run_column, standard_error=options.error, chance=options.chance, at=options.at,
        budgets=options.budget, cost=options.cost,
    )  # fmt: skip
    law = of_file.law_of_file(options.file, question)
    print(json.dumps(law, indent=1) if options.json else of_file.text(law))
