"""Model families, from arrays to arrays: each is a module with MODULE, SIZES, VARIANTS, make and inputs."""

from types import ModuleType
from typing import Any

import flax.linen as nn

from scaling.errors import UserError
from scaling.models import clip, dit, resnet, swin, t5, timesformer, unet, vae, vilt, vit, vivit

MODELS: dict[str, ModuleType] = {
    "resnet": resnet,
    "vit": vit,
    "swin": swin,
    "clip": clip,
    "vilt": vilt,
    "vivit": vivit,
    "timesformer": timesformer,
    "dit": dit,
    "unet": unet,
    "vae": vae,
    "t5": t5,
}


def make(family: str, variant: str, **options: Any) -> nn.Module:
    """Returns the model of a family's variant, e.g. ("dit", "XL/2"); `options` override its fields.

    Raises:
        UserError: if the family, the variant or an option is unknown, or a value is not allowed.
    """
    return module(family).make(variant, **options)


def inputs(family: str, variant: str, **options: Any) -> dict[str, Any]:
    """Returns the model's arguments by name, as `jax.ShapeDtypeStruct`s with a leading batch of 1.

    Raises:
        UserError: if the family or the variant is unknown.
    """
    return module(family).inputs(variant, **options)


def module(family: str) -> ModuleType:
    """Returns the module of a family.

    Raises:
        UserError: if there is no such family.
    """
    if family not in MODELS:
        raise UserError(f"name={family!r}: no such family of models; there are {', '.join(MODELS)}")
    return MODELS[family]
