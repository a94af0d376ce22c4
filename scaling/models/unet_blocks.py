"""The parts of the U-Nets of diffusion: residual blocks, attention, the spatial transformer, resampling.

Activations are [B, H, W, C]; c [B, E] is the embedding of the conditioning, context [B, M, K] a sequence that
is attended to. ADM is Dhariwal & Nichol 2021, LDM is Rombach et al. 2022. Both start the kernels that do not
start at 0 as PyTorch does by default; biases start at 0 here.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.models import convolutions
from scaling.models.convolutions import group_norm
from scaling.models.layers import ACTIVATIONS, dot_product_attention, layer_norm, sincos_embedding

Kind = Literal["adm", "ldm"]
Sampling = Literal["none", "up", "down"]

uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(fan_in)
zeros = nn.initializers.zeros_init()
Dense = functools.partial(nn.Dense, kernel_init=uniform)
convolution = functools.partial(convolutions.convolution, init=uniform)


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour: [B, H, W, C] -> [B, 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def downsample(x: jax.Array) -> jax.Array:
    """Means of 2x2 pixels: [B, H, W, C] -> [B, H / 2, W / 2, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


class TimeEmbedding(nn.Module):
    """Times [B] -> [B, 4 * width]: `width` cosines and sines, then an MLP."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        t = sincos_embedding(t, self.width)  # [B, width]
        t = Dense(4 * self.width, dtype=self.dtype, name="up")(t)  # [B, 4 * width]
        return Dense(4 * self.width, dtype=self.dtype, name="down")(nn.silu(t))  # [B, 4 * width]


class ResidualBlock(nn.Module):
    """BigGAN's residual block, x [B, H, W, C] and c [B, E] -> [B, H', W', features].

    With `scale_shift` c scales and shifts the second norm's output: AdaGN (ADM, equation 3). Without, c is
    added before that norm. Both branches may be resampled, before the first convolution (ADM, section 3). The
    second convolution starts at 0.
    """

    features: int
    scale_shift: bool
    sampling: Sampling = "none"
    groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        norm = functools.partial(group_norm, groups=self.groups, epsilon=self.epsilon)
        conv = functools.partial(convolution, self.features, dtype=self.dtype)
        h = nn.silu(norm(x, "norm_in"))  # [B, H, W, C]
        if self.sampling != "none":
            resample = upsample if self.sampling == "up" else downsample
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


class Attention(nn.Module):
    """Multi-head attention of x [B, N, D] to itself, or to a context [B, M, K]. Returns [B, N, D].

    Unlike `layers.Attention` its kernels start as PyTorch's, and query, key and value may go without a bias.
    """

    heads: int
    bias: bool = True
    out_init: nn.initializers.Initializer = uniform
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        project = functools.partial(
            nn.DenseGeneral,
            features=(self.heads, width // self.heads),
            use_bias=self.bias,
            kernel_init=uniform,
            dtype=self.dtype,
        )
        source = x if context is None else context
        q = project(name="query")(x)  # [B, N, heads, D / heads]
        k = project(name="key")(source)  # [B, M, heads, D / heads]
        v = project(name="value")(source)  # [B, M, heads, D / heads]
        x = dot_product_attention(q, k, v)  # [B, N, heads, D / heads]
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=self.out_init, dtype=self.dtype, name="out")
        return out(x)  # [B, N, D]


class GatedMlp(nn.Module):
    """GEGLU (Shazeer 2020): [B, N, D] -> value * gelu(gate), each [B, N, 4D] -> [B, N, D]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = Dense(8 * width, dtype=self.dtype, name="up")(x)  # [B, N, 8D]
        value, gate = jnp.split(x, 2, axis=-1)  # [B, N, 4D] each
        return Dense(width, dtype=self.dtype, name="down")(value * ACTIVATIONS["gelu"](gate))  # [B, N, D]


class SpatialTransformer(nn.Module):
    """LDM's transformer over pixels, x [B, H, W, C] and context [B, M, K] -> [B, H, W, C].

    A norm and a 1x1 convolution, then self-attention, cross-attention and a gated MLP on H * W tokens, then a
    1x1 convolution that starts at 0, and a residual around it all (LDM, appendix E.2.1). The group norm has
    epsilon 1e-6, the layer norms 1e-5. Query, key and value have no bias.
    """

    heads: int
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        attention = functools.partial(Attention, self.heads, bias=False, dtype=self.dtype)
        norm = functools.partial(layer_norm, epsilon=1e-5)
        batch, height, width, channels = x.shape
        h = group_norm(x, "norm", groups=self.groups, epsilon=1e-6)  # [B, H, W, C]
        h = convolution(channels, 1, dtype=self.dtype, name="proj_in")(h)
        h = h.reshape(batch, height * width, channels)  # [B, N, C]
        h = h + attention(name="attention")(norm(h, "norm_attention"))
        h = h + attention(name="cross_attention")(norm(h, "norm_cross_attention"), context)
        h = h + GatedMlp(self.dtype, name="mlp")(norm(h, "norm_mlp"))
        h = h.reshape(batch, height, width, channels)  # [B, H, W, C]
        return x + convolution(channels, 1, init=zeros, dtype=self.dtype, name="proj_out")(h)


class Block(nn.Module):
    """A residual block and, where there are `heads`, attention between its pixels.

    x [B, H, W, C], c [B, E], context [B, M, K] -> [B, H', W', features]. ADM's attention is one residual
    layer whose output projection starts at 0 and sees no context; LDM's is the spatial transformer.
    """

    features: int
    heads: int
    kind: Kind
    sampling: Sampling = "none"
    groups: int = 32
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

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
        h = Attention(self.heads, out_init=zeros, dtype=self.dtype, name="attention")(h)
        return x + h.reshape(x.shape)  # [B, H', W', features]
