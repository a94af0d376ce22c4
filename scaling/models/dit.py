"""Diffusion transformers, DiT (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers").

x is a noisy image or latent [B, H, W, C], t a time [B], y a class [B]; D is the width, N the number of
patches.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.models import variants
from scaling.models.base import Family
from scaling.models.layers import (
    XAVIER,
    Attention,
    Dense,
    Embed,
    EncoderBlock,
    Mlp,
    Remat,
    layer_norm,
    patch_grid,
    patchify,
    sincos_embedding,
    sincos_positions,
    stack,
    unpatchify,
)
from scaling.models.placement import constrain
from scaling.models.roles import EMBED, LINEAR, NORM, VECTOR, Blocks, Part, Role, merged
from scaling.models.variants import TransformerSize

Block = Literal["in-context", "cross-attention", "adaln", "adaln-zero"]

LATENT = (32, 32, 4)  # [H, W, C] of the SD-VAE's latent of a 256x256 image
SIZES = {  # table 1 of the paper, and the ladder for small data
    "S": TransformerSize(depth=12, width=384, heads=6, shape=LATENT),
    "B": TransformerSize(depth=12, width=768, heads=12, shape=LATENT),
    "L": TransformerSize(depth=24, width=1024, heads=16, shape=LATENT),
    "XL": TransformerSize(depth=28, width=1152, heads=16, shape=LATENT),
    **variants.LADDER,
}
VARIANTS: tuple[variants.Variant, ...] = (
    *((f"{size}/{patch}", {}) for size in ("S", "B", "L", "XL") for patch in (8, 4, 2)),
    *(("XL/2", {"block": block}) for block in ("in-context", "cross-attention", "adaln")),
    *variants.LADDER_VARIANTS,
)

normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()


class TimeEmbedding(nn.Module):
    """Times [B] -> [B, width]: 256 sines and cosines, then an MLP."""

    width: int
    shift: int = 0
    dtype: Any = jnp.float32

    ROLES = Part({"up": LINEAR, "down": LINEAR})

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        t = sincos_embedding(t, 256, self.shift)  # [B, 256]
        t = Dense(self.width, kernel_init=normal, dtype=self.dtype, name="up")(t)  # [B, D]
        return Dense(self.width, kernel_init=normal, dtype=self.dtype, name="down")(nn.silu(t))  # [B, D]


MODULATION = Part({"kernel": Role("matrix", ("in",), ("modulation",)), "bias": VECTOR})


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Scales and shifts x [B, N, D] by one vector [B, D] each per example."""
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


class AdaLNBlock(nn.Module):
    """Block with adaLN: c gives a shift and a scale to both norms, and with adaLN-Zero (`gated`) also gates.

    x [B, N, D], c [B, D] -> [B, N, D] (section 3.2). Each of the two residuals has a gate. The layer that
    gives shifts, scales and gates is initialised at 0.
    """

    heads: int
    mlp_ratio: float = 4.0
    gated: bool = True
    qk_norm: bool = False
    mlp_epsilon: float = 1e-6
    dtype: Any = jnp.float32

    ROLES = Part({"modulation": MODULATION, "attention": Attention.ROLES, "mlp": Mlp.ROLES})

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        width, count = x.shape[-1], 6 if self.gated else 4
        m = Dense(count * width, kernel_init=zeros, dtype=self.dtype, name="modulation")(nn.silu(c))
        m = jnp.split(m, count, axis=-1)  # [B, D] each
        if self.gated:
            shift1, scale1, gate1, shift2, scale2, gate2 = m
        else:
            shift1, scale1, shift2, scale2 = m
            gate1 = gate2 = jnp.ones_like(shift1)

        h = layer_norm(x, "norm_attention", scale=False, bias=False)  # [B, N, D]
        attention = Attention(self.heads, self.qk_norm, dtype=self.dtype, name="attention")
        h = attention(modulate(h, shift1, scale1))
        x = x + gate1[:, None, :] * h
        h = layer_norm(x, "norm_mlp", scale=False, bias=False, epsilon=self.mlp_epsilon)
        mlp = Mlp(round(width * self.mlp_ratio), "gelu_tanh", dtype=self.dtype, name="mlp")
        h = mlp(modulate(h, shift2, scale2))
        x = x + gate2[:, None, :] * h
        return constrain(x, "batch", "token", "embed")


class CrossAttentionBlock(nn.Module):
    """The standard block with attention to the conditioning after self-attention.

    x [B, N, D], tokens [B, 2, D] -> [B, N, D] (section 3.2).
    """

    heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dtype: Any = jnp.float32

    ROLES = Part(
        {**EncoderBlock.ROLES.names, "norm_cross_attention": NORM, "cross_attention": Attention.ROLES}
    )

    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        attention = functools.partial(Attention, self.heads, self.qk_norm, dtype=self.dtype)
        h = layer_norm(x, "norm_attention")  # [B, N, D]
        x = x + attention(name="attention")(h)
        h = layer_norm(x, "norm_cross_attention")
        x = x + attention(kernels=XAVIER, name="cross_attention")(h, tokens)
        h = layer_norm(x, "norm_mlp")
        hidden = round(x.shape[-1] * self.mlp_ratio)
        x = x + Mlp(hidden, "gelu_tanh", dtype=self.dtype, name="mlp")(h)
        return constrain(x, "batch", "token", "embed")


class FinalLayer(nn.Module):
    """LayerNorm, modulated by c if the blocks are, and a linear layer that is initialised at 0.

    x [B, N, D], c [B, D] -> [B, N, features].
    """

    features: int
    adaln: bool = True
    dtype: Any = jnp.float32

    ROLES = Part({"norm": NORM, "modulation": MODULATION, "linear": LINEAR})

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        x = layer_norm(x, "norm", scale=not self.adaln, bias=not self.adaln)  # [B, N, D]
        if self.adaln:
            m = Dense(2 * x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="modulation")(nn.silu(c))
            shift, scale = jnp.split(m, 2, axis=-1)  # [B, D] each
            x = modulate(x, shift, scale)
        return Dense(self.features, kernel_init=zeros, dtype=self.dtype, name="linear")(x)


class DiT(nn.Module):
    """x [B, H, W, C], t [B] float32, y [B] int32 -> [B, H, W, 2C], or C without `learn_sigma`; float32.

    Label `num_classes` is the null label of classifier-free guidance; the training objective, not the model,
    drops labels. With `learn_sigma` the second C channels parametrise the variance. Positions are fixed and
    computed for the input's own grid, so that H and W can be any multiples of `patch`.

    Raises:
        UserError: if `patch` does not divide H and W, `heads` does not divide the width, or the kind of block
            does not have an option.
    """

    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    block: Block = "adaln-zero"
    learn_sigma: bool = True
    qk_norm: bool = False
    # Values that differ between diffusers and the authors' code; importing diffusers' weights sets them.
    frequency_shift: int = 0  # shift in the times' frequencies 10000^(-i / (128 - shift)); 1 in diffusers
    mlp_epsilon: float = 1e-6  # epsilon of the LayerNorm before an adaLN block's MLP; 1e-5 in diffusers
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def tokens(self, shape: Sequence[int]) -> int:
        """Returns the number of patches of an input [..., H, W, C], without conditioning tokens."""
        return math.prod(patch_grid(shape, self.patch))

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        dtype, channels, grid = jnp.dtype(self.dtype), x.shape[-1], patch_grid(x.shape, self.patch)
        label = Embed(self.num_classes + 1, self.width, embedding_init=normal, dtype=dtype, name="label")
        x = Dense(self.width, dtype=dtype, name="patch")(patchify(x, self.patch))  # [B, N, D]
        x = x + jnp.asarray(sincos_positions(grid, self.width), dtype)[None]
        x = constrain(x, "batch", "token", "embed")
        t = TimeEmbedding(self.width, self.frequency_shift, dtype, name="time")(t)  # [B, D]
        y = label(y)  # [B, D]
        c = t + y  # [B, D]

        block: dict[str, Any] = dict(heads=self.heads, mlp_ratio=self.mlp_ratio, qk_norm=self.qk_norm)
        block |= dict(dtype=dtype, name="blocks")
        repeat: dict[str, Any] = dict(remat=self.remat, unroll=self.unroll)
        if self.mlp_epsilon != 1e-6 and not self.block.startswith("adaln"):
            raise UserError(f"mlp_epsilon={self.mlp_epsilon}: is of adaln blocks; {self.block} has 1e-6")
        if self.block == "in-context":
            x = jnp.concatenate([x, t[:, None], y[:, None]], axis=1)  # [B, N + 2, D]
            x = stack(EncoderBlock(activation="gelu_tanh", **block), self.depth, x, **repeat)
            x = x[:, :-2]  # [B, N, D]
        elif self.block == "cross-attention":
            tokens = jnp.stack([t, y], axis=1)  # [B, 2, D]
            x = stack(CrossAttentionBlock(**block), self.depth, x, tokens, **repeat)  # [B, N, D]
        else:
            gated = self.block == "adaln-zero"
            block |= dict(gated=gated, mlp_epsilon=self.mlp_epsilon)
            x = stack(AdaLNBlock(**block), self.depth, x, c, **repeat)  # [B, N, D]

        features = self.patch**2 * channels * (2 if self.learn_sigma else 1)
        final = FinalLayer(features, self.block.startswith("adaln"), dtype, name="final")
        x = final(x, c)  # [B, N, features]
        return unpatchify(x, grid, self.patch).astype(jnp.float32)  # [B, H, W, C or 2C]


def make(variant: str, **options: Any) -> DiT:
    """Returns the DiT that `variant` names, e.g. "XL/2"; `options` override its fields.

    Raises:
        UserError: if the size or an option is unknown, or a value is not allowed.
    """
    size, patch = variants.parse(variant, SIZES)
    return variants.build(DiT, size.fields(patch), options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: x [1, H, W, C], t [1], y [1]. No option changes them."""
    size, _ = variants.parse(variant, SIZES)
    return {
        "x": jax.ShapeDtypeStruct((1, *size.shape), jnp.float32),
        "t": jax.ShapeDtypeStruct((1,), jnp.float32),
        "y": jax.ShapeDtypeStruct((1,), jnp.int32),
    }


FAMILY = Family(
    module=DiT,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "patch": LINEAR.at("before"),
            "time": TimeEmbedding.ROLES,
            "label": EMBED,
            "blocks": merged([EncoderBlock.ROLES, CrossAttentionBlock.ROLES, AdaLNBlock.ROLES]).at(Blocks()),
            "final": FinalLayer.ROLES,
        }
    ),
    make=make,
    inputs=inputs,
)
