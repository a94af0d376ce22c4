"""Arrays in, arrays out: every family is a module with MODULE, SIZES, VARIANTS, make and inputs."""

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
    """The model that `variant` of `family` names, e.g. ("dit", "XL/2"); `options` override its fields.

    Raises: UserError for an unknown family, variant or option, or a value that is not allowed.
    """
    return module(family).make(variant, **options)


def inputs(family: str, variant: str, **options: Any) -> dict[str, Any]:
    """The model's arguments by name, as `jax.ShapeDtypeStruct`s with a leading batch of 1.

    Raises: UserError for an unknown family or variant.
    """
    return module(family).inputs(variant, **options)


def module(family: str) -> ModuleType:
    if family not in MODELS:
        raise UserError(f"family={family!r}: no such family; there are {', '.join(MODELS)}")
    return MODELS[family]
