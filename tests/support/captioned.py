"""A denoiser of seconds that is conditioned on masked tokens: a model, its conditioning, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.models import variants
from scaling.models.base import Family
from scaling.models.layers import Dense, Embed
from scaling.models.roles import EMBED, LINEAR, Part

VARIANTS: tuple[variants.Variant, ...] = (("tiny", {}),)


@dataclass(frozen=True)
class Words:
    """The tokens of a caption and which of them are words; the null condition has no word."""

    def of(self, batch: Mapping[str, jax.Array], helpers: Mapping[str, Any]) -> dict[str, jax.Array]:
        return {"tokens": batch["text"], "mask": batch["text_mask"]}

    def null(self, condition: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, condition)


class Captioned(nn.Module):
    """x [B, H, W, C], t [B], {tokens [B, L] int32, mask [B, L] bool} -> [B, H, W, C]."""

    vocabulary: int = 600
    width: int = 8

    @property
    def conditioning(self) -> Words:
        return Words()

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, condition: Mapping[str, jax.Array]) -> jax.Array:
        normal = nn.initializers.normal(1.0)
        words = Embed(self.vocabulary, self.width, embedding_init=normal, name="word")(condition["tokens"])
        mask = condition["mask"][..., None].astype(jnp.float32)
        caption = (words * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1.0)  # [B, D]
        h = Dense(self.width, name="patch")(x) + jnp.sin(t)[:, None, None, None]
        return Dense(x.shape[-1], name="head")(jnp.tanh(h + caption[:, None, None]))


def make(variant: str, **options: Any) -> Captioned:
    return variants.build(Captioned, {}, options)


def inputs(variant: str, **options: Any) -> dict[str, Any]:
    text = jax.ShapeDtypeStruct((1, 12), jnp.int32)
    return {
        "x": jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32),
        "t": jax.ShapeDtypeStruct((1,), jnp.float32),
        "condition": {"tokens": text, "mask": text.update(dtype=jnp.bool_)},
    }


FAMILY = Family(
    module=Captioned,
    sizes={},
    variants=VARIANTS,
    roles=Part({"word": EMBED, "patch": LINEAR, "head": LINEAR}),
    make=make,
    inputs=inputs,
)
