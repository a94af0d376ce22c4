"""Parts of the U-Nets of diffusion: residual blocks, attention, the spatial transformer, resampling.

Activations are [B, H, W, C]; c [B, E] is the embedding of the conditioning, context [B, M, K] a sequence to
attend to. ADM is Dhariwal & Nichol 2021, LDM is Rombach et al. 2022. As in both, kernels that are not
initialised at 0 are initialised by PyTorch's default; biases are initialised at 0 here.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.models import convolutions
from scaling.models.convolutions import CONVOLUTION, average_pool, group_norm, upsample
from scaling.models.layers import (
    Attention,
    EncoderBlock,
    Kernels,
    Mlp,
    fan_in_uniform,
    layer_norm,
    sincos_embedding,
)
from scaling.models.roles import LINEAR, NORM, Part

Kind = Literal["adm", "ldm"]
Sampling = Literal["none", "up", "down"]

zeros = nn.initializers.zeros_init()
KERNELS = Kernels(*(fan_in_uniform,) * 5)
Dense = functools.partial(nn.Dense, kernel_init=fan_in_uniform)
convolution = functools.partial(convolutions.convolution, init=fan_in_uniform)


class TimeEmbedding(nn.Module):
    """Times [B] -> [B, 4 * width]: `width` cosines and sines, then an MLP."""

    width: int
    dtype: Any = jnp.float32

    ROLES = Part({"up": LINEAR, "down": LINEAR})

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        t = sincos_embedding(t, self.width)  # [B, width]
        t = Dense(4 * self.width, dtype=self.dtype, name="up")(t)  # [B, 4 * width]
        return Dense(4 * self.width, dtype=self.dtype, name="down")(nn.silu(t))  # [B, 4 * width]


class ResidualBlock(nn.Module):
    """BigGAN's residual block, x [B, H, W, C] and c [B, E] -> [B, H', W', features].

    With `scale_shift`, c scales and shifts the second norm's output: AdaGN (ADM, equation 3). Without it, c
    is added before that norm. Both branches may be resampled, before the first convolution (ADM, section 3).
    The second convolution is initialised at 0.
    """

    features: int
    scale_shift: bool
    sampling: Sampling = "none"
    groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    ROLES = Part(
        {
            "norm_in": NORM,
            "conv_in": CONVOLUTION,
            "condition": LINEAR,
            "norm_out": NORM,
            "conv_out": CONVOLUTION,
            "skip": CONVOLUTION,
        }
    )

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        norm = functools.partial(group_norm, groups=self.groups, epsilon=self.epsilon)
        conv = functools.partial(convolution, self.features, dtype=self.dtype)
        h = nn.silu(norm(x, "norm_in"))  # [B, H, W, C]
        if self.sampling != "none":
            resample = upsample if self.sampling == "up" else functools.partial(average_pool, side=2)
            h, x = resample(h), resample(x)  # [B, H', W', C]
        h = conv(name="conv_in")(h)  # [B, H', W', features]

        count = 2 if self.scale_shift else 1
        c = Dense(count * self.features, dtype=self.dtype, name="condition")(nn.silu(c))
        c = c[:, None, None, :]  # [B, 1, 1, features or 2 * features]
        if self.scale_shift:
            scale, shift = jnp.split(c, 2, axis=-1)  # [B, 1, 1, features] each
            h = norm(h, "norm_out") * (1 + scale) + shift
        else:
            h = norm(h + c, "norm_out")
        h = conv(init=zeros, name="conv_out")(nn.silu(h))  # [B, H', W', features]
        if x.shape[-1] != self.features:
            x = conv(1, name="skip")(x)
        return x + h


class SpatialTransformer(nn.Module):
    """LDM's transformer over pixels, x [B, H, W, C] and context [B, M, K] -> [B, H, W, C].

    It is a norm and a 1x1 convolution, then self-attention, cross-attention and a gated MLP on H * W tokens,
    then a 1x1 convolution that is initialised at 0, and a residual around it all (LDM, appendix E.2.1). The
    group norm has epsilon 1e-6, the layer norms 1e-5. Query, key and value have no bias.
    """

    heads: int
    groups: int = 32
    dtype: Any = jnp.float32

    ROLES = Part(
        {
            "norm": NORM,
            "proj_in": CONVOLUTION,
            **EncoderBlock.ROLES.names,
            "norm_cross_attention": NORM,
            "cross_attention": Attention.ROLES,
            "proj_out": CONVOLUTION,
        }
    )

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        parts: dict[str, Any] = dict(kernels=KERNELS, dtype=self.dtype)
        attention = functools.partial(Attention, self.heads, qkv_bias=False, **parts)
        norm = functools.partial(layer_norm, epsilon=1e-5)
        batch, height, width, channels = x.shape
        h = group_norm(x, "norm", groups=self.groups, epsilon=1e-6)  # [B, H, W, C]
        h = convolution(channels, 1, dtype=self.dtype, name="proj_in")(h)
        h = h.reshape(batch, height * width, channels)  # [B, N, C]
        h = h + attention(name="attention")(norm(h, "norm_attention"))
        h = h + attention(name="cross_attention")(norm(h, "norm_cross_attention"), context)
        h = h + Mlp(4 * channels, "gelu", gated=True, **parts, name="mlp")(norm(h, "norm_mlp"))  # GEGLU
        h = h.reshape(batch, height, width, channels)  # [B, H, W, C]
        return x + convolution(channels, 1, init=zeros, dtype=self.dtype, name="proj_out")(h)


class Block(nn.Module):
    """A residual block and, unless `heads` is 0, attention between its pixels.

    x [B, H, W, C], c [B, E], context [B, M, K] -> [B, H', W', features]. ADM's attention is one residual
    layer without context, whose output projection is initialised at 0; LDM's is the spatial transformer.
    """

    features: int
    heads: int
    kind: Kind
    sampling: Sampling = "none"
    groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    ROLES = Part(
        {
            "residual": ResidualBlock.ROLES,
            "transformer": SpatialTransformer.ROLES,
            "norm_attention": NORM,
            "attention": Attention.ROLES,
        }
    )

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, context: jax.Array | None) -> jax.Array:
        residual = ResidualBlock(
            self.features, self.kind == "adm", self.sampling, self.groups, self.epsilon, self.dtype,
            name="residual",
        )  # fmt: skip
        x = residual(x, c)  # [B, H', W', features]
        if not self.heads:
            return x
        if context is not None:
            return SpatialTransformer(self.heads, self.groups, self.dtype, name="transformer")(x, context)
        h = group_norm(x, "norm_attention", groups=self.groups, epsilon=self.epsilon)
        h = h.reshape(h.shape[0], -1, self.features)  # [B, N, features]
        kernels = KERNELS._replace(out=zeros)
        h = Attention(self.heads, kernels=kernels, dtype=self.dtype, name="attention")(h)
        return x + h.reshape(x.shape)  # [B, H', W', features]
