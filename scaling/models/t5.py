"""The encoder of T5 v1.1 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer"; v1.1: gated MLPs as in Shazeer 2020, "GLU Variants Improve Transformer").

text [B, N] are token ids; D is the width. There are no biases and no scale of the attention's logits, and the
only positions are relative ones that are added to those logits.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import UserError
from scaling.models import variants
from scaling.models.attention import bias_of
from scaling.models.base import Family
from scaling.models.layers import Attention, Embed, Kernels, Mlp, Remat, stack
from scaling.models.placement import constrain
from scaling.models.roles import EMBED, NORM, RELATIVE_BIAS, Blocks, Part

normal = nn.initializers.normal

LENGTH = 512  # tokens per text in pre-training (section 3.1.2)


@dataclasses.dataclass(frozen=True)
class T5Size:
    """A row of the size table."""

    depth: int
    width: int
    heads: int
    mlp_width: int


SIZES = {  # google-research/t5x, the gin files of t5_1_1: small, base, xxl
    "Small": T5Size(depth=8, width=512, heads=6, mlp_width=1024),
    "Base": T5Size(depth=12, width=768, heads=12, mlp_width=2048),
    "XXL": T5Size(depth=24, width=4096, heads=64, mlp_width=10240),
}
VARIANTS: tuple[variants.Variant, ...] = tuple((size, {}) for size in SIZES)


def rms_norm(x: jax.Array, name: str, epsilon: float) -> jax.Array:
    """Applies RMSNorm (Zhang & Sennrich 2019) over the last axis, in float32; the result has x's dtype."""
    norm = nn.RMSNorm(epsilon=epsilon, dtype=jnp.float32, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each key's position relative to each query's (section 2.1): [N, N] int32.

    Half of the buckets are for keys after the query. In each half, one half of the buckets hold a single
    distance each, the other ranges that grow logarithmically; all distances from `max_distance` share the
    last. N is `length`.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]  # [N, N], key - query
    half, distance = buckets // 2, np.abs(offset)
    single = half // 2
    growth = np.log(np.maximum(distance, 1) / single) / np.log(max_distance / single)
    ranged = single + (growth * (half - single)).astype(np.int32)
    bucket = np.where(distance < single, distance, np.minimum(ranged, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)


class Block(nn.Module):
    """x [B, N, D], positions [1, heads, N, N], padding [B, 1, 1, N] -> [B, N, D].

    Positions and padding are added to the attention's logits. Kernels are initialised as in Mesh TensorFlow:
    N(0, 1 / inputs), the query's also divided by sqrt(head width), in place of the scale of the logits.
    """

    heads: int
    head_width: int
    mlp_width: int
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    ROLES = Part({"norm_attention": NORM, "attention": Attention.ROLES, "norm_mlp": NORM, "mlp": Mlp.ROLES})

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, padding: jax.Array) -> jax.Array:
        width, inner = x.shape[-1], self.heads * self.head_width
        kernels = Kernels(
            query=normal((width * self.head_width) ** -0.5),
            key=normal(width**-0.5),
            out=normal(inner**-0.5),
            up=normal(width**-0.5),
            down=normal(self.mlp_width**-0.5),
        )
        parts: dict[str, Any] = dict(kernels=kernels, dtype=self.dtype)
        attention = Attention(
            self.heads,
            head_width=self.head_width,
            scale=1.0,
            qkv_bias=False,
            out_bias=False,
            **parts,
            name="attention",
        )
        mlp = Mlp(self.mlp_width, "gelu_tanh", gated=True, use_bias=False, **parts, name="mlp")
        x = x + attention(rms_norm(x, "norm_attention", self.epsilon), bias=positions + padding)  # [B, N, D]
        x = x + mlp(rms_norm(x, "norm_mlp", self.epsilon))
        return constrain(x, "batch", "token", "embed")


class T5Encoder(nn.Module):
    """text [B, N] int32, mask [B, N] bool, true at real tokens -> [B, N, width] float32, 0 at the others.

    The ids at the other positions have no influence. All blocks share one table of relative positions.

    Raises:
        UserError: if distances cannot be sorted into `buckets` up to `max_distance`, or the mask does not
            have the text's shape.
    """

    width: int = 512
    depth: int = 8
    heads: int = 6
    head_width: int = 64
    mlp_width: int = 1024
    vocabulary: int = 32128
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6  # epsilon of RMSNorm
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def tokens(self, shape: Sequence[int]) -> int:
        """Returns the number of tokens per text of `shape` [..., N]."""
        return shape[-1]

    @nn.compact
    def __call__(self, text: jax.Array, mask: jax.Array) -> jax.Array:
        self._check(text, mask)
        dtype = jnp.dtype(self.dtype)
        embed = Embed(self.vocabulary, self.width, embedding_init=normal(1.0), dtype=dtype, name="tokens")
        x = constrain(embed(text), "batch", "token", "embed")  # [B, N, D]

        init = normal(self.width**-0.5)
        table = self.param("relative_bias", init, (self.buckets, self.heads))
        positions = table[relative_buckets(text.shape[1], self.buckets, self.max_distance)]  # [N, N, heads]
        positions = positions.transpose(2, 0, 1)[None]  # [1, heads, N, N]
        padding = bias_of(mask)[:, None, None]  # [B, 1, 1, N]

        block = Block(self.heads, self.head_width, self.mlp_width, self.epsilon, dtype, name="blocks")
        repeat: dict[str, Any] = dict(remat=self.remat, unroll=self.unroll)
        x = stack(block, self.depth, x, positions, padding, **repeat)  # [B, N, D]
        x = rms_norm(x.astype(jnp.float32), "norm", self.epsilon)
        return jnp.where(mask[:, :, None], x, 0)

    def _check(self, text: jax.Array, mask: jax.Array) -> None:
        if mask.shape != text.shape:
            raise UserError(f"mask: its shape {mask.shape} must be that of the text, {text.shape}")
        if self.buckets % 4:
            raise UserError(f"buckets={self.buckets}: must be a multiple of 4")
        if self.max_distance <= self.buckets // 4:
            raise UserError(f"max_distance={self.max_distance}: must be greater than {self.buckets // 4}")


def make(variant: str, **options: Any) -> T5Encoder:
    """Returns the encoder that `variant` names, e.g. "XXL"; `options` override its fields.

    Raises:
        UserError: if the size or an option is unknown, or a value is not allowed.
    """
    return variants.build(T5Encoder, dataclasses.asdict(_size(variant)), options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: text [1, 512], mask [1, 512]. No option changes them."""
    _size(variant)
    return {
        "text": jax.ShapeDtypeStruct((1, LENGTH), jnp.int32),
        "mask": jax.ShapeDtypeStruct((1, LENGTH), jnp.bool_),
    }


def _size(variant: str) -> T5Size:
    if variant not in SIZES:
        raise UserError(f"model.variant={variant!r}: must be one of {', '.join(SIZES)}")
    return SIZES[variant]


FAMILY = Family(
    module=T5Encoder,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "tokens": EMBED,
            "relative_bias": RELATIVE_BIAS,
            "blocks": Block.ROLES.at(Blocks()),
            "norm": NORM.at("after"),
        }
    ),
    make=make,
    inputs=inputs,
)
