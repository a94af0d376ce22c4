"""Evaluators by name: each measures a run exactly, with its own data and sampling."""

from collections.abc import Mapping
from typing import Any

from scaling.errors import UserError
from scaling.evaluators.base import Evaluator
from scaling.evaluators.denoising import DenoisingLoss
from scaling.evaluators.frechet import Frechet
from scaling.evaluators.grid import Grid
from scaling.evaluators.linear import Linear
from scaling.evaluators.matching import Matching
from scaling.evaluators.metrics import Metrics
from scaling.evaluators.retrieval import Retrieval, ZeroShot
from scaling.evaluators.views import Views
from scaling.run.options import Named
from scaling.validation import default_options, parse_dataclass

EVALUATORS: dict[str, type[Evaluator]] = {
    "metrics": Metrics,
    "denoising_loss": DenoisingLoss,
    "frechet": Frechet,
    "grid": Grid,
    "linear": Linear,
    "matching": Matching,
    "retrieval": Retrieval,
    "zero_shot": ZeroShot,
    "views": Views,
}


def make(described: Mapping[str, Named]) -> dict[str, Any]:
    """Makes the evaluators that a config describes, by the names that it gives them.

    Raises:
        UserError: for an unknown evaluator or a wrong option; it names the key.
    """
    return {
        name: parse_dataclass(_class_of(name, choice.name), choice.options, f"evaluators.{name}")
        for name, choice in described.items()
    }


def defaults(name: str, kind: object) -> dict[str, Any]:
    """Returns the options, with their defaults, of the evaluator `kind` that a config calls `name`.

    Raises:
        UserError: if `kind` is no evaluator.
    """
    return default_options(_class_of(name, kind))


def _class_of(name: str, kind: object) -> type[Evaluator]:
    if not isinstance(kind, str) or kind not in EVALUATORS:
        raise UserError(f"evaluators.{name}.name={kind!r}: must be one of {', '.join(sorted(EVALUATORS))}")
    return EVALUATORS[kind]
