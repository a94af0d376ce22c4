"""Layers shared by the convolutional families: convolutions, batch and group norm.

Activations are [B, H, W, C]. Parameters are float32; `dtype` is that of the arithmetic, statistics always
float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Init = nn.initializers.Initializer
lecun = nn.initializers.lecun_normal()
ones = nn.initializers.ones_init()


def convolution(
    features: int,
    kernel: int = 3,
    stride: int = 1,
    *,
    bias: bool = True,
    init: Init = lecun,
    dtype: Any = jnp.float32,
    name: str,
) -> nn.Conv:
    """A square convolution [B, H, W, C] -> [B, H / stride, W / stride, features], padded on all sides."""
    return nn.Conv(
        features,
        (kernel, kernel),
        stride,
        kernel // 2,
        use_bias=bias,
        kernel_init=init,
        dtype=dtype,
        name=name,
    )


def group_norm(x: jax.Array, name: str, *, groups: int = 32, epsilon: float = 1e-5) -> jax.Array:
    """GroupNorm (Wu & He 2018) over [B, ..., C], in float32; the result has the dtype of x."""
    norm = nn.GroupNorm(
        groups,
        epsilon=epsilon,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels digits
        dtype=jnp.float32,
        name=name,
    )
    return norm(x.astype(jnp.float32)).astype(x.dtype)


class BatchNorm(nn.Module):
    """BatchNorm (Ioffe & Szegedy 2015) over all but the last axis of x [..., C], in float32.

    In training the statistics are the batch's: under `jit` with a sharded batch, of the global batch. Running
    statistics, in the collection `batch_stats`, follow them as momentum * old + (1 - momentum) * new, the
    variance unbiased (divided by n - 1), as PyTorch stores it.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Init = ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtype, width = x.dtype, x.shape[-1]
        x = x.astype(jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        var = self.variable("batch_stats", "var", jnp.ones, width)
        m, v = mean.value, var.value
        if train:
            n = x.size // width
            m = jnp.mean(x, axis=range(x.ndim - 1))  # [C]
            v = jnp.var(x, axis=range(x.ndim - 1))  # [C]
            if not self.is_initializing():
                unbiased = v * (n / max(n - 1, 1))
                mean.value = self.momentum * mean.value + (1 - self.momentum) * m
                var.value = self.momentum * var.value + (1 - self.momentum) * unbiased
        scale = self.param("scale", self.scale_init, (width,))
        bias = self.param("bias", nn.initializers.zeros_init(), (width,))
        shape = (1,) * (x.ndim - 1) + (width,)
        x = (x - m.reshape(shape)) * (jax.lax.rsqrt(v + self.epsilon) * scale).reshape(shape)
        return (x + bias.reshape(shape)).astype(dtype)
