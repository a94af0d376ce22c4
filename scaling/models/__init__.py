"""Model families, from arrays to arrays: each is a `Family` in a file of its own."""

import functools
from typing import Any

import flax.linen as nn

from scaling.errors import UserError
from scaling.models import clip, dit, resnet, swin, t5, timesformer, unet, vae, vilt, vit, vivit
from scaling.models.base import Family
from scaling.models.roles import Role, find, merged

MODELS: dict[str, Family[Any]] = {
    "resnet": resnet.FAMILY,
    "vit": vit.FAMILY,
    "swin": swin.FAMILY,
    "clip": clip.FAMILY,
    "vilt": vilt.FAMILY,
    "vivit": vivit.FAMILY,
    "timesformer": timesformer.FAMILY,
    "dit": dit.FAMILY,
    "unet": unet.FAMILY,
    "vae": vae.FAMILY,
    "t5": t5.FAMILY,
}
ROLES = merged(family.roles for family in MODELS.values())  # a name means the same in every family


def make(name: str, variant: str, **options: Any) -> nn.Module:
    """Returns the model of a family's variant, e.g. ("dit", "XL/2"); `options` override its fields.

    Raises:
        UserError: if the family, the variant or an option is unknown, or a value is not allowed.
    """
    model: nn.Module = family(name).make(variant, **options)
    return model


def inputs(name: str, variant: str, **options: Any) -> dict[str, Any]:
    """Returns the model's arguments by name, as `jax.ShapeDtypeStruct`s with a leading batch of 1.

    Raises:
        UserError: if the family or the variant is unknown.
    """
    return family(name).inputs(variant, **options)


def family(name: str) -> Family[Any]:
    """Returns the family of this name.

    Raises:
        UserError: if there is no such family.
    """
    if name not in MODELS:
        raise UserError(f"name={name!r}: no such family of models; there are {', '.join(MODELS)}")
    return MODELS[name]


@functools.cache
def role_of(path: str) -> Role:
    """Returns the role of the parameter at `path`, such as "blocks/mlp/up/kernel", of any family.

    Raises:
        UserError: if a name on the path is not declared.
    """
    return find(ROLES, path)
