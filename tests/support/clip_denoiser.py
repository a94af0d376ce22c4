"""A denoiser of clips, of seconds."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.models import variants
from scaling.models.base import Family
from scaling.models.layers import Dense, Embed
from scaling.models.roles import EMBED, LINEAR, Part

VARIANTS: tuple[variants.Variant, ...] = (("tiny", {}),)


class ClipDenoiser(nn.Module):
    """x [B, T, H, W, C], t [B], y [B] int32 -> [B, T, H, W, C]."""

    num_classes: int = 3
    frames: int = 4
    width: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(1.0)
        label = Embed(self.num_classes + 1, self.width, embedding_init=normal, name="label")(y)
        h = Dense(self.width, name="patch")(x) + jnp.sin(t)[:, None, None, None, None]
        h = h + jnp.cumsum(h, axis=1) + label[:, None, None, None]  # later frames see earlier ones
        return Dense(x.shape[-1], name="head")(jnp.tanh(h))


def make(variant: str, **options: Any) -> ClipDenoiser:
    return variants.build(ClipDenoiser, {}, options)


def inputs(variant: str, **options: Any) -> dict[str, Any]:
    return {
        "x": jax.ShapeDtypeStruct((1, 4, 8, 8, 3), jnp.float32),
        "t": jax.ShapeDtypeStruct((1,), jnp.float32),
        "y": jax.ShapeDtypeStruct((1,), jnp.int32),
    }


FAMILY = Family(
    module=ClipDenoiser,
    sizes={},
    variants=VARIANTS,
    roles=Part({"label": EMBED, "patch": LINEAR, "head": LINEAR}),
    make=make,
    inputs=inputs,
)
