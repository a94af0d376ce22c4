"""Objectives by name. The training loop knows no other difference between tasks."""

from dataclasses import fields
from typing import Any

import flax.linen as nn

from scaling.errors import UserError
from scaling.objectives.autoencoder import Autoencoder
from scaling.objectives.base import Objective
from scaling.objectives.classification import Classification
from scaling.objectives.contrastive import Contrastive
from scaling.objectives.diffusion import Diffusion
from scaling.objectives.frozen import Frozen
from scaling.objectives.vision_language import VisionLanguage
from scaling.preprocessing import SYMMETRIC, Preprocessing

OBJECTIVES: dict[str, Any] = {
    "classification": Classification,
    "contrastive": Contrastive,
    "diffusion": Diffusion,
    "autoencoder": Autoencoder,
    "vision_language": VisionLanguage,
    "frozen": Frozen,
}


GIVEN = ("model", "preprocessing")  # fields that are no options: they come from other sections of a config


def trains(name: str) -> bool:
    """Returns whether the objective `name` has a loss; one without a loss has no data either."""
    return issubclass(OBJECTIVES[name], Objective)


def make(name: str, model: nn.Module, preprocessing: Preprocessing = SYMMETRIC, **options: Any) -> Objective:
    """Makes the objective `name` for a model that sees images through `preprocessing`.

    Raises:
        UserError: for an unknown name or option, or a preprocessing that the objective cannot have.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective={name!r}: must be one of {', '.join(OBJECTIVES)}")
    names = [field.name for field in fields(OBJECTIVES[name])]
    allowed = [key for key in names if key not in GIVEN]
    for key, value in options.items():
        if key not in allowed:
            raise UserError(f"{key}={value!r}: not an option of {name}, which has {', '.join(allowed)}")
    if "preprocessing" in names:
        return OBJECTIVES[name](model, preprocessing, **options)
    if preprocessing != SYMMETRIC and trains(name):
        raise UserError(
            f"{name}: generates images in [-1, 1]; leave out preprocessing.mean={preprocessing.mean} and .std"
        )
    return OBJECTIVES[name](model, **options)
