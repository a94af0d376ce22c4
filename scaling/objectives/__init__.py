"""What is minimised: a task is an objective, and the training loop knows no other difference."""

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

OBJECTIVES: dict[str, Any] = {
    "classification": Classification,
    "contrastive": Contrastive,
    "diffusion": Diffusion,
    "autoencoder": Autoencoder,
    "vision_language": VisionLanguage,
    "frozen": Frozen,
}


def make(name: str, model: nn.Module, **options: Any) -> Objective:
    """The objective `name` for a model. Raises UserError for an unknown name or option."""
    if name not in OBJECTIVES:
        raise UserError(f"objective={name!r}: must be one of {', '.join(OBJECTIVES)}")
    allowed = [field.name for field in fields(OBJECTIVES[name]) if field.name != "model"]
    for key, value in options.items():
        if key not in allowed:
            raise UserError(f"{key}={value!r}: not an option of {name}, which has {', '.join(allowed)}")
    return OBJECTIVES[name](model, **options)
