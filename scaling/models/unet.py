"""The U-Nets of diffusion: ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis") and
LDM (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models").

x is a noisy image or latent [B, H, W, C], t a time [B], y a class [B].
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.models import variants
from scaling.models.base import Family
from scaling.models.convolutions import CONVOLUTION, group_norm, upsample
from scaling.models.layers import REMAT, Embed, Remat
from scaling.models.placement import constrain
from scaling.models.roles import EMBED, NORM, Part, merged
from scaling.models.unet_blocks import Block, Kind, TimeEmbedding, convolution, zeros


@dataclasses.dataclass(frozen=True)
class UNetSize:
    """A variant: the shape of its inputs, and its module's fields."""

    shape: tuple[int, int, int]  # [H, W, C] of an input
    fields: dict[str, Any]


# ADM is from the appendix's tables of hyperparameters and the flags published with the weights; ADM-U is
# ADM-64 followed by the upsampler. LDM is from tables 13 (LDM-8) and 15 (LDM-4), class-conditional ImageNet.
# Both papers name the resolutions that have attention; at the variant's size they are these strides.
ADM_256: dict[str, Any] = dict(multipliers=(1, 1, 2, 2, 4, 4), depth=2, attention=(8, 16, 32))
ADM_64: dict[str, Any] = dict(multipliers=(1, 2, 3, 4), depth=3, attention=(2, 4, 8))
LDM_4: dict[str, Any] = dict(multipliers=(1, 2, 3, 5), depth=2, attention=(2, 4, 8))
LDM_8: dict[str, Any] = dict(multipliers=(1, 2, 4), depth=2, attention=(1, 2, 4))
LDM: dict[str, Any] = dict(kind="ldm", learn_sigma=False)
SIZES = {
    "ADM-64": UNetSize((64, 64, 3), dict(width=192, head_width=64, **ADM_64)),
    "ADM-256": UNetSize((256, 256, 3), dict(width=256, head_width=64, **ADM_256)),
    "ADM-U-256": UNetSize((256, 256, 3), dict(width=192, heads=4, upsampler=True, **ADM_256)),
    "LDM-4": UNetSize((64, 64, 3), dict(width=192, heads=1, **LDM_4, **LDM)),
    "LDM-8": UNetSize((32, 32, 4), dict(width=256, head_width=32, **LDM_8, **LDM)),
    # ADM at 28, 14 and 7 pixels, much smaller than any published size, for data such as MNIST on a laptop.
    "small": UNetSize(
        (28, 28, 1),
        dict(width=16, multipliers=(1, 2, 4), depth=1, attention=(2, 4), head_width=32, groups=8)
        | dict(num_classes=10),
    ),
}
VARIANTS: tuple[variants.Variant, ...] = tuple((name, {}) for name in SIZES)


class UNet(nn.Module):
    """x [B, H, W, C], t [B] float32, y [B] int32 -> [B, H, W, 2C], or C without `learn_sigma`; float32.

    Stage i works at H / 2^i x W / 2^i with `width * multipliers[i]` channels. It has `depth` blocks on the
    way down and `depth` + 1 on the way up, each of which also takes one output of the way down as input.
    Stages whose stride 2^i is in `attention` have attention after each block, with `heads` heads or, if that
    is 0, with heads of `head_width` channels; so has the middle.

    ADM adds the label's embedding to the time's, scales and shifts with the sum in every residual block, and
    resamples in residual blocks (section 3 and equation 3). LDM adds the time, attends to the label's
    embedding, of `context` channels, in spatial transformers, and resamples with plain convolutions.

    Label `num_classes` is the null label of classifier-free guidance; the training objective, not the model,
    drops labels. With `learn_sigma` the second C channels parametrise the variance. An `upsampler` also takes
    the image `low` [B, h, w, C] at low resolution, resized bilinearly, as further channels of its input.

    Raises:
        UserError: if the strides do not divide the input, heads or groups do not divide a width, no stage has
            one of the strides in `attention`, or the image `low` is missing or not asked for.
    """

    kind: Kind = "adm"
    width: int = 256
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    depth: int = 2
    attention: tuple[int, ...] = (8, 16, 32)
    heads: int = 0
    head_width: int = 64
    groups: int = 32
    context: int = 512
    num_classes: int = 1000
    learn_sigma: bool = True
    upsampler: bool = False
    epsilon: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"

    def stage_heads(self, stage: int) -> int:
        """Returns the number of attention heads that a stage has if it has attention.

        Raises:
            UserError: if they do not divide its channels.
        """
        features = self.width * self.multipliers[stage]
        name, value = ("heads", self.heads) if self.heads else ("head_width", self.head_width)
        if features % value:
            raise UserError(
                f"{name}={value}: must divide the channels of stage {stage}, which are {features}"
            )
        return self.heads or features // self.head_width

    def _check(self, x: jax.Array, low: jax.Array | None) -> None:
        strides = [2**stage for stage in range(len(self.multipliers))]
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"multipliers={self.multipliers}: must be one or more positive integers")
        if not set(self.attention) <= set(strides):
            raise UserError(f"attention={self.attention}: must be of the stages' strides {tuple(strides)}")
        if self.width % self.groups:
            raise UserError(f"groups={self.groups}: must divide the width, which is {self.width}")
        if x.shape[1] % strides[-1] or x.shape[2] % strides[-1]:
            raise UserError(
                f"multipliers={self.multipliers}: {len(strides)} stages need a height and width that "
                f"{strides[-1]} divides, and these are {x.shape[1]}x{x.shape[2]}"
            )
        if self.upsampler != (low is not None):
            needs = "needs the input low" if self.upsampler else "takes no input low"
            raise UserError(f"upsampler={self.upsampler}: this model {needs}")

    def _embed_conditions(self, t: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the conditioning of residual blocks, and for LDM the context of spatial transformers."""
        dtype, adm = jnp.dtype(self.dtype), self.kind == "adm"
        normal, features = nn.initializers.normal(1.0), 4 * self.width if adm else self.context
        table = Embed(self.num_classes + 1, features, embedding_init=normal, dtype=dtype, name="label")
        c, label = TimeEmbedding(self.width, dtype, name="time")(t), table(y)  # [B, 4 * width], [B, features]
        return (c + label, None) if adm else (c, label[:, None])

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array, low: jax.Array | None = None) -> jax.Array:
        self._check(x, low)
        dtype, channels, adm = jnp.dtype(self.dtype), x.shape[-1], self.kind == "adm"
        conv = functools.partial(convolution, dtype=dtype)
        options: dict[str, Any] = dict(kind=self.kind, groups=self.groups, epsilon=self.epsilon, dtype=dtype)
        block_class: Any = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat])
        block = functools.partial(block_class, **options)
        widths = [self.width * multiplier for multiplier in self.multipliers]
        heads = [self.stage_heads(i) if 2**i in self.attention else 0 for i in range(len(widths))]

        if low is not None:
            low = jax.image.resize(low, x.shape[:3] + low.shape[3:], "bilinear", antialias=False)
            x = jnp.concatenate([x, low], axis=-1)  # [B, H, W, 2C]
        c, context = self._embed_conditions(t, y)  # [B, 4 * width], and for LDM [B, 1, context]

        x = conv(self.width, name="input")(x)  # [B, H, W, width]
        skips = [x]
        for i, features in enumerate(widths):
            for j in range(self.depth):
                x = block(features, heads[i], name=f"down_{i}_block_{j}")(x, c, context)
                skips.append(x)  # [B, H / 2^i, W / 2^i, features]
            if i < len(widths) - 1:
                if adm:
                    x = block(features, 0, sampling="down", name=f"down_{i}_sample")(x, c, context)
                else:
                    x = conv(features, stride=2, name=f"down_{i}_sample")(x)
                skips.append(x)  # [B, H / 2^(i + 1), W / 2^(i + 1), features]
            x = constrain(x, "batch", None, None, None)

        x = block(widths[-1], self.stage_heads(len(widths) - 1), name="middle_block_0")(x, c, context)
        x = block(widths[-1], 0, name="middle_block_1")(x, c, context)

        for i, features in reversed(list(enumerate(widths))):
            for j in range(self.depth + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)  # [B, H / 2^i, W / 2^i, several widths]
                x = block(features, heads[i], name=f"up_{i}_block_{j}")(x, c, context)
            if i > 0:
                if adm:
                    x = block(features, 0, sampling="up", name=f"up_{i}_sample")(x, c, context)
                else:
                    x = conv(features, name=f"up_{i}_sample")(upsample(x))
            x = constrain(x, "batch", None, None, None)  # [B, H / 2^(i - 1), W / 2^(i - 1), features]

        x = nn.silu(group_norm(x, "norm", groups=self.groups, epsilon=self.epsilon))
        outputs = 2 * channels if self.learn_sigma else channels
        return conv(outputs, init=zeros, name="output")(x).astype(jnp.float32)  # [B, H, W, C or 2C]


def _size(variant: str) -> UNetSize:
    if variant not in SIZES:
        raise UserError(f"model.variant={variant!r}: must be one of {', '.join(SIZES)}")
    return SIZES[variant]


def make(variant: str, **options: Any) -> UNet:
    """Returns the U-Net that `variant` names, e.g. "ADM-256"; `options` override its fields.

    Raises:
        UserError: if the variant or an option is unknown, or a value is not allowed.
    """
    return variants.build(UNet, _size(variant).fields, options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: x [1, H, W, C], t [1], y [1].

    An upsampler also has `low` [1, H / 4, W / 4, C].
    """
    height, width, channels = _size(variant).shape
    shapes = {
        "x": jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32),
        "t": jax.ShapeDtypeStruct((1,), jnp.float32),
        "y": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    if make(variant, **options).upsampler:
        shapes["low"] = jax.ShapeDtypeStruct((1, height // 4, width // 4, channels), jnp.float32)
    return shapes


# ADM resamples in a residual block, LDM with a convolution.
SAMPLE = merged([CONVOLUTION, Block.ROLES])
FAMILY = Family(
    module=UNet,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "input": CONVOLUTION,
            "time": TimeEmbedding.ROLES,
            "label": EMBED,
            "down_#_block_#": Block.ROLES,
            "down_#_sample": SAMPLE,
            "middle_block_#": Block.ROLES,
            "up_#_block_#": Block.ROLES,
            "up_#_sample": SAMPLE,
            "norm": NORM.at("after"),
            "output": CONVOLUTION,
        }
    ),
    make=make,
    inputs=inputs,
)
