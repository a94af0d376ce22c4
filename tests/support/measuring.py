"""An evaluator on weights at hand: prepared, and run once."""

from pathlib import Path
from typing import Any

from scaling.evaluators.base import Context, Evaluator, Measure, prepare
from scaling.run.build import Run
from scaling.run.helpers import RunHelpers


def prepared(evaluator: Evaluator, name: str, run: Run, folder: Path = Path()) -> Measure:
    return prepare(evaluator, Context(name, run, folder, RunHelpers(run)))


def measured(evaluator: Evaluator, name: str, run: Run, weights: Any) -> dict[str, float]:
    values = prepared(evaluator, name, run)({"collections": {}, **weights}, 0)
    assert sorted(values) == sorted(evaluator.metrics(name, run))  # a study's metric is checked by them
    return values
