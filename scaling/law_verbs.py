"""The command line's verbs that ask laws: law, of any table; predict, advise and compare, of studies."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from scaling.flag_types import count, path, positive
from scaling.overrides import OVERRIDES, parse_overrides

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
    _study_verbs(verb)


def _study_verbs(verb: Verb) -> None:
    """Adds the verbs that ask a study's laws."""
    sub = verb(
        "predict", _predict, "Predict what a configuration of a study would reach, before it is trained.",
        "scaling predict runs/mnist_dit --config.model.width=128 --seeds=3 --tolerance=10%\n\n"
        "The configuration is the study's largest, with these overrides. The verdict says whether the\n"
        "interval (90 %) is as narrow as asked, and whether anything speaks against the law.\n" + OVERRIDES,
    )  # fmt: skip
    sub.add_argument("workdir", metavar="WORKDIR", type=path, help="study folder")
    sub.add_argument("--seeds", type=count, default=1, help="runs whose mean is predicted (default: 1)")
    sub.add_argument("--tolerance", type=_share, help="how near it has to be, as 10%% (default: the study's)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.set_defaults(config=None)

    sub = verb(
        "advise", _advise, "Name the next runs that narrow a prediction most, for the hours that there are.",
        "scaling advise runs/mnist_dit --hours=2 --config.model.width=128\n\n"
        "Without overrides, the prediction is that of four times the largest gmacs.\n" + OVERRIDES,
    )  # fmt: skip
    sub.add_argument("workdir", metavar="WORKDIR", type=path, help="study folder")
    sub.add_argument("--hours", required=True, type=positive, help="hours of the runs, one after the other")
    sub.add_argument("--seeds", type=count, default=1, help="runs whose mean is predicted (default: 1)")
    sub.add_argument(
        "--candidates", metavar="STUDY", type=path,
        help="study file with the configurations to choose from (default: the study's values, combined)",
    )  # fmt: skip
    sub.add_argument("--json", action="store_true", help="print a JSON list of objects")
    sub.set_defaults(config=None)

    sub = verb(
        "compare", _compare, "Compare studies, or the families of one, at equal compute.",
        "scaling compare runs/a runs/b",
    )  # fmt: skip
    sub.add_argument("workdirs", metavar="WORKDIR", type=path, nargs="+", help="study folders")
    sub.add_argument(
        "--axis", choices=("gmacs", "train_flops"), default="gmacs",
        help="compute of a forward pass, or of the whole training (default: gmacs)",
    )  # fmt: skip
    sub.add_argument("--json", action="store_true", help="print a JSON list of objects")


def _share(text: str) -> float:
    percent = text.endswith("%")
    share = positive(text.removesuffix("%")) / (100 if percent else 1)
    if share >= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be below 100 %, as 10% or 0.1")
    return share


def _predict(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.study import predict

    asked = parse_overrides(overrides)
    answer = predict.predict(options.workdir, asked, options.seeds, options.tolerance)
    print(json.dumps(answer, indent=1) if options.json else predict.text(answer))


def _advise(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.study import advise

    asked = parse_overrides(overrides)
    advice = advise.advise(options.workdir, options.hours, asked, options.seeds, options.candidates)
    print(json.dumps(advice, indent=1) if options.json else advise.text(advice))


def _compare(options: argparse.Namespace, overrides: list[str]) -> None:
    from scaling.study import compare

    pairs = compare.compare(options.workdirs, options.axis)
    print(json.dumps(pairs, indent=1) if options.json else compare.text(pairs))


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
