"""Layers shared by the convolutional families: convolutions, batch and group norm.

Activations are [B, H, W, C]. Parameters are float32; `dtype` is that of the arithmetic, statistics always
float32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.models.execution import EXECUTION
from scaling.models.layers import REMAT, Init, Remat
from scaling.models.placement import layer
from scaling.models.roles import VECTOR, Blocks, Part, Role

lecun = nn.initializers.lecun_normal()
ones = nn.initializers.ones_init()


CONVOLUTION = Part({"kernel": Role("matrix", ("row", "column", "in"), ("out",)), "bias": VECTOR})


def _is_convolution(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == "conv_general_dilated"


# As for linear layers, "dots" keeps the outputs that are costly to recompute: here, those of convolutions.
POLICIES = {**REMAT, "dots": _is_convolution}


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
    """Returns a square convolution, [B, H, W, C] -> [B, H / stride, W / stride, features].

    The input is padded on all sides.
    """
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
    """Applies GroupNorm (Wu & He 2018) over [B, ..., C], in float32; the result has the dtype of x."""
    norm = nn.GroupNorm(
        groups,
        epsilon=epsilon,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels digits
        dtype=jnp.float32,
        name=name,
    )
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def upsample(x: jax.Array) -> jax.Array:
    """Repeats each pixel (nearest neighbour): [B, H, W, C] -> [B, 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def average_pool(x: jax.Array, side: int) -> jax.Array:
    """Averages squares of `side` pixels: [B, H, W, C] -> [B, H / side, W / side, C]."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // side, side, width // side, side, channels), axis=(2, 4))


class BatchNorm(nn.Module):
    """BatchNorm (Ioffe & Szegedy 2015) over all but the last axis of x [..., C], in float32.

    In training, statistics are those of the batch: under `jit` with a sharded batch, of the global batch.
    Running statistics, in the collection `batch_stats`, become momentum * old + (1 - momentum) * new, where
    the variance is unbiased (divided by n - 1), as PyTorch stores it.
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


class Stage(nn.Module):
    """`depth` residual blocks at one resolution: [B, H, W, C] -> [B, H / stride, W / stride, F].

    `block(stride=..., name=...)` makes a block, which is called with (x, train). The first block has the
    stride. The others are alike: their parameters and statistics are stacked [depth - 1, ...], whether the
    loop over them is compiled once (`nn.scan`) or unrolled.
    """

    block: Callable[..., nn.Module]
    depth: int
    stride: int
    remat: Remat
    unroll: bool

    @staticmethod
    def roles(block: Part) -> Part:
        """Returns the roles of a stage whose blocks have these."""
        return Part({"first": block.at(Blocks(stacked=False)), "blocks": block.at(Blocks(first=1))})

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def step(block: nn.Module, x: jax.Array) -> tuple[jax.Array, None]:
            return block(x, train), None  # type: ignore[operator]

        policy, first = POLICIES.get(self.remat), self.block(stride=self.stride, name="first")
        unroll = self.unroll or EXECUTION.get().unrolled
        first_step = step if policy is None else nn.remat(step, policy=policy)
        x, _ = first_step(first, x)  # [B, H / stride, W / stride, F]
        if self.depth == 1:
            return x
        block = self.block(name="blocks")
        loop = nn.scan(
            layer(step, block, self.depth - 1, policy, unroll),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            check_constancy_invariants=False,  # nothing here could vary; checking it costs another trace
            length=self.depth - 1,
            unroll=self.depth - 1 if unroll else 1,
        )
        return loop(block, x)[0]  # [B, H / stride, W / stride, F]
