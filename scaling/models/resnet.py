"""Residual networks, ResNet (He et al. 2016, "Deep Residual Learning for Image Recognition").

This is the form known as v1.5: a bottleneck's stride is in its 3x3 convolution, and the scale of every
block's last norm is initialised at 0 (Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1). x is
an image [B, H, W, C] of any size; D is the width of the first stage, F that of a block's output. A stride
halves H and W, rounding up.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.models import variants
from scaling.models.base import Family
from scaling.models.convolutions import CONVOLUTION, BatchNorm, Stage, convolution
from scaling.models.layers import Remat, uniform
from scaling.models.placement import constrain
from scaling.models.roles import LINEAR, NORM, Part

SIZES: dict[str, dict[str, Any]] = {  # table 1 of the paper
    "18": {"depths": (2, 2, 2, 2), "bottleneck": False},
    "34": {"depths": (3, 4, 6, 3), "bottleneck": False},
    "50": {"depths": (3, 4, 6, 3), "bottleneck": True},
    "101": {"depths": (3, 4, 23, 3), "bottleneck": True},
    "152": {"depths": (3, 8, 36, 3), "bottleneck": True},
}
# The ladder, for digits: the form that section 4.2 has for small images, up to its width. Stages have one
# block, so that there is no loop: in a loop, even of one iteration, XLA's convolutions for CPUs take many
# times as long.
LADDER: dict[str, dict[str, Any]] = {
    name: {"depths": (1, 1, 1), "width": width, "bottleneck": False, "stem": "3x3", "num_classes": 10}
    for name, width in (("A", 4), ("F", 8), ("P", 12), ("N", 16))
}
SIZES |= LADDER
VARIANTS: tuple[variants.Variant, ...] = tuple((size, {}) for size in SIZES)
EXPANSION = 4  # width of a bottleneck's output over that of its 3x3 convolution

zeros = nn.initializers.zeros_init()
he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, equation 14


class Block(nn.Module):
    """A residual block, y = relu(F(x) + W x) (equation 2): [B, H, W, C] -> [B, H / stride, W / stride, F].

    F is two 3x3 convolutions of `width`, or with `bottleneck` convolutions of 1x1, 3x3 and, four times as
    wide, 1x1 (figure 5). W is the identity where shapes allow it, else a 1x1 convolution and a norm (option B
    of section 4.1).
    """

    width: int
    stride: int = 1
    bottleneck: bool = True
    dtype: Any = jnp.float32

    ROLES = Part({"conv#": CONVOLUTION, "norm#": NORM, "shortcut": CONVOLUTION, "norm_shortcut": NORM})

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(convolution, bias=False, init=he, dtype=self.dtype)
        width, out = self.width, self.width * (EXPANSION if self.bottleneck else 1)
        if self.bottleneck:
            h = conv(width, 1, name="conv1")(x)  # [B, H, W, width]
            h = nn.relu(BatchNorm(name="norm1")(h, train))
            h = conv(width, 3, self.stride, name="conv2")(h)  # [B, H / stride, W / stride, width]
            h = nn.relu(BatchNorm(name="norm2")(h, train))
            h = conv(out, 1, name="conv3")(h)  # [B, H / stride, W / stride, F]
            h = BatchNorm(scale_init=zeros, name="norm3")(h, train)
        else:
            h = conv(width, 3, self.stride, name="conv1")(x)  # [B, H / stride, W / stride, F]
            h = nn.relu(BatchNorm(name="norm1")(h, train))
            h = conv(width, 3, name="conv2")(h)  # [B, H / stride, W / stride, F]
            h = BatchNorm(scale_init=zeros, name="norm2")(h, train)
        if self.stride != 1 or x.shape[-1] != out:
            x = conv(out, 1, self.stride, name="shortcut")(x)  # [B, H / stride, W / stride, F]
            x = BatchNorm(name="norm_shortcut")(x, train)
        return nn.relu(h + x)


class ResNet(nn.Module):
    """x [B, H, W, C] -> logits [B, num_classes] float32.

    `depths` are the blocks of the stages, whose convolutions are 1, 2, 4 and 8 times `width` wide. The stem
    is a 7x7 convolution and a pooling, each of stride 2, or, for small images, a 3x3 convolution of stride 1
    (section 4.2): the sides of the maps are then four times those written below.
    Running statistics are in the collection `batch_stats`, which `train=True` updates where it is mutable.
    Convolutions are initialised N(0, 2 / fan out), the head within 1 / sqrt(fan in), as PyTorch's linear
    layers are.

    Raises:
        UserError: if a stage has no block.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    stem: Literal["7x7", "3x3"] = "7x7"
    num_classes: int = 1000
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll: bool = False

    def features(self, x: jax.Array) -> jax.Array:
        """Returns the head's input: [B, H, W, C] -> [B, F of the last stage] float32."""
        return self(x, output="features")

    def feature_maps(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the output of each stage, float32.

        [B, H, W, C] -> [B, H / 4, W / 4, F], [B, H / 8, W / 8, 2F], ...
        """
        return self(x, output="feature_maps")

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        *,
        output: Literal["logits", "features", "feature_maps"] = "logits",
    ) -> Any:
        """Applies the model; `train` normalises with statistics of the batch, under `jit` the global one."""
        if min(self.depths, default=0) < 1:
            raise UserError(f"depths={self.depths}: every stage must have at least 1 block")
        dtype = jnp.dtype(self.dtype)
        kernel, stride = (7, 2) if self.stem == "7x7" else (3, 1)
        stem = convolution(self.width, kernel, stride, bias=False, init=he, dtype=dtype, name="stem")
        x = nn.relu(BatchNorm(name="norm_stem")(stem(x), train))  # [B, H / 2, W / 2, D]
        if self.stem == "7x7":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # [B, H / 4, W / 4, D]

        maps = []
        for i, depth in enumerate(self.depths):
            width, stride = self.width * 2**i, 1 if i == 0 else 2
            block = functools.partial(Block, width, bottleneck=self.bottleneck, dtype=dtype)
            stage = Stage(block, depth, stride, self.remat, self.unroll, name=f"stage{i + 1}")
            x = constrain(stage(x, train), "batch", None, None, None)  # [B, H / 2^(2 + i), W / 2^(2 + i), F]
            maps.append(x.astype(jnp.float32))
        if output == "feature_maps":
            return tuple(maps)
        x = jnp.mean(maps[-1], axis=(1, 2))  # [B, F]
        if output == "features":
            return x
        init = uniform(x.shape[-1] ** -0.5)
        return nn.Dense(self.num_classes, kernel_init=init, bias_init=init, name="head")(x)


def make(variant: str, **options: Any) -> ResNet:
    """Returns the ResNet that `variant` names, e.g. "50"; `options` override its fields.

    Raises:
        UserError: if the size or an option is unknown, or a value is not allowed.
    """
    return variants.build(ResNet, _size(variant), options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: x [1, H, W, C]. No option changes them."""
    _size(variant)
    shape = variants.DIGIT if variant in LADDER else (224, 224, 3)
    return {"x": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}


def _size(variant: str) -> dict[str, Any]:
    if variant not in SIZES:
        raise UserError(f"model.variant={variant!r}: must be one of {', '.join(SIZES)}")
    return SIZES[variant]


FAMILY = Family(
    module=ResNet,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "stem": CONVOLUTION.at("before"),
            "norm_stem": NORM.at("before"),
            "stage#": Stage.roles(Block.ROLES),
            "head": LINEAR.at("after"),
        }
    ),
    make=make,
    inputs=inputs,
)
