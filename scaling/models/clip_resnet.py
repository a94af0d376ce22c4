"""CLIP's modified ResNet (Radford et al. 2021, section 2.4).

It has a ResNet-D stem of three convolutions (He et al. 2019, "Bag of Tricks for Image Classification"),
average pools for strides (Zhang 2019, "Making Convolutional Networks Shift-Invariant Again"), and attention
pooling. x is an image [B, H, W, C]; D is the width of the last stage.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.models.convolutions import CONVOLUTION, BatchNorm, Stage, average_pool, convolution
from scaling.models.layers import Attention, Kernels, Remat, fan_in_uniform, resize_positions
from scaling.models.placement import constrain
from scaling.models.roles import NORM, POSITIONS, Part

STRIDE = 32  # pixels of the image per pixel of the last stage
EXPANSION = 4  # width of a bottleneck's output over that of its 3x3 convolution

normal = nn.initializers.normal
zeros = nn.initializers.zeros_init()


class Bottleneck(nn.Module):
    """x [B, H, W, C] -> [B, H / stride, W / stride, 4 width]: 1x1, 3x3 and 1x1 convolutions, added to x.

    The convolutions have stride 1; average pools before the last one and before the shortcut's 1x1 have
    `stride`. The last norm's scale is initialised at 0.
    """

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    ROLES = Part({"conv#": CONVOLUTION, "norm#": NORM, "shortcut": CONVOLUTION, "norm_shortcut": NORM})

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(convolution, bias=False, init=fan_in_uniform, dtype=self.dtype)
        out = EXPANSION * self.width
        h = conv(self.width, 1, name="conv1")(x)  # [B, H, W, width]
        h = nn.relu(BatchNorm(name="norm1")(h, train))
        h = conv(self.width, 3, name="conv2")(h)  # [B, H, W, width]
        h = nn.relu(BatchNorm(name="norm2")(h, train))
        h = h if self.stride == 1 else average_pool(h, self.stride)  # [B, H / stride, W / stride, width]
        h = conv(out, 1, name="conv3")(h)  # [B, H / stride, W / stride, 4 width]
        h = BatchNorm(scale_init=zeros, name="norm3")(h, train)
        if self.stride != 1 or x.shape[-1] != out:
            x = x if self.stride == 1 else average_pool(x, self.stride)
            x = conv(out, 1, name="shortcut")(x)  # [B, H / stride, W / stride, 4 width]
            x = BatchNorm(name="norm_shortcut")(x, train)
        return nn.relu(h + x)


class AttentionPool(nn.Module):
    """Attention with the mean as its one query: [B, h, w, D] -> [B, features].

    The mean is also the first of the keys. Learned positions for a `grid` (h, w) are added to all tokens.
    """

    features: int
    heads: int
    grid: tuple[int, int]
    dtype: Any = jnp.float32

    ROLES = Part({"positions": POSITIONS, "attention": Attention.ROLES})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)  # [B, N, D]
        x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1)  # [B, 1 + N, D]
        x = x + learned_positions(self, self.grid, (rows, columns), width).astype(self.dtype)[None]
        attention = Attention(
            self.heads,
            features=self.features,
            kernels=Kernels(*(normal(width**-0.5),) * 5),
            dtype=self.dtype,
            name="attention",
        )
        return attention(x[:, :1], x)[:, 0]  # [B, features]


def learned_positions(module: nn.Module, old: tuple[int, int], new: tuple[int, int], width: int) -> jax.Array:
    """Returns positions [1 + h w, D] of one token and a `new` (h, w) grid.

    They are those of the module's table for an `old` grid, which is initialised N(0, 1 / D), resized.
    """
    table = module.param("positions", normal(width**-0.5), (1 + old[0] * old[1], width))
    return resize_positions(table, old, new, extra=1)


class ModifiedResNet(nn.Module):
    """x [B, H, W, C] -> features [B, features] float32.

    `depth` are the blocks of the four stages; `width` is that of the last, 32 times the stem's. Convolutions
    are initialised within 1 / sqrt(fan in), the kernels of attention pooling N(0, 1 / D). For inputs of
    another size than `resolution` the positions are resized. Running statistics are in the collection
    `batch_stats`, which `train=True` updates where it is mutable.

    Raises:
        UserError: if 32 does not divide H, W and `resolution`, 64 and `heads` do not divide the width, or a
            stage is empty.
    """

    features: int
    depth: tuple[int, int, int, int]
    width: int
    heads: int
    resolution: int
    dtype: Any = jnp.float32
    remat: Remat = "none"
    unroll: bool = False

    ROLES = Part(
        {
            "stem#": CONVOLUTION,
            "norm_stem#": NORM,
            "stage#": Stage.roles(Bottleneck.ROLES),
            "pool": AttentionPool.ROLES,
        }
    )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        self._check(*x.shape[1:3])
        conv = functools.partial(convolution, bias=False, init=fan_in_uniform, dtype=self.dtype)
        stem = self.width // STRIDE
        for i, (width, stride) in enumerate(((stem // 2, 2), (stem // 2, 1), (stem, 1)), 1):
            x = conv(width, 3, stride, name=f"stem{i}")(x)  # [B, H / 2, W / 2, D / 64; at last D / 32]
            x = nn.relu(BatchNorm(name=f"norm_stem{i}")(x, train))
        x = average_pool(x, 2)  # [B, H / 4, W / 4, D / 32]
        for i, depth in enumerate(self.depth):
            block = functools.partial(Bottleneck, stem * 2**i, dtype=self.dtype)
            stride, repeat = 1 if i == 0 else 2, (self.remat, self.unroll)
            x = Stage(block, depth, stride, *repeat, name=f"stage{i + 1}")(x, train)
            x = constrain(x, "batch", None, None, None)  # [B, H / 2^(2 + i), W / 2^(2 + i), D / 2^(3 - i)]
        grid = (self.resolution // STRIDE,) * 2
        x = AttentionPool(self.features, self.heads, grid, self.dtype, name="pool")(x)  # [B, features]
        return x.astype(jnp.float32)

    def _check(self, height: int, width: int) -> None:
        if height % STRIDE or width % STRIDE:
            raise UserError(f"x: its height and width, {height}x{width}, must be multiples of {STRIDE}")
        if self.resolution % STRIDE:
            raise UserError(f"resolution={self.resolution}: must be a multiple of {STRIDE}")
        if self.width % (2 * STRIDE):
            raise UserError(f"width={self.width}: must be a multiple of {2 * STRIDE}, for the stem's half")
        if min(self.depth) < 1:
            raise UserError(f"depth={self.depth}: every stage must have at least 1 block")
