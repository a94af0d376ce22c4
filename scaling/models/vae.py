"""The KL autoencoder of latent diffusion (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent
Diffusion Models", sections 3.1 and appendix G), as Stable Diffusion and DiT use it.

x is an image [B, H, W, C], in [-1, 1]; z is its latent [B, H/f, W/f, Z], where each level after the first
doubles f. Diffusion models see `latent_scale * z`; moments, samples and `decode` here are unscaled.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import UserError
from scaling.models import variants
from scaling.models.base import Family
from scaling.models.convolutions import CONVOLUTION, convolution, group_norm, upsample
from scaling.models.layers import REMAT, Attention, fan_in_uniform
from scaling.models.placement import constrain
from scaling.models.roles import NORM, Part

Remat = Literal["none", "full"]


@dataclasses.dataclass(frozen=True)
class VAESize:
    """A row of the size table."""

    widths: tuple[int, ...]  # channels of the levels, the first at the image's resolution
    blocks: int  # residual blocks per level of the encoder; the decoder has one more
    groups: int  # groups of GroupNorm
    latent_channels: int
    latent_scale: float | None
    shape: tuple[int, int, int]  # [H, W, C] of an input


SIZES = {
    # Stable Diffusion's, f8 with 4 channels: first stage and scale_factor of CompVis/stable-diffusion,
    # configs/stable-diffusion/v1-inference.yaml.
    "SD": VAESize((128, 256, 512, 512), 2, 32, latent_channels=4, latent_scale=0.18215, shape=(256, 256, 3)),
    # For data such as MNIST on a laptop: f4, to 7x7 latents, whose scale is measured on the data.
    "small": VAESize((8, 16, 32), 1, 4, latent_channels=4, latent_scale=None, shape=(28, 28, 1)),
}
VARIANTS: tuple[variants.Variant, ...] = tuple((name, {}) for name in SIZES)

conv = functools.partial(convolution, init=fan_in_uniform)  # the original's initialisation


class ResBlock(nn.Module):
    """Norm, SiLU and 3x3 convolution, twice, added to the input: [B, h, w, C] -> [B, h, w, width].

    If the width changes, the input passes through a 1x1 convolution.
    """

    width: int
    groups: int
    epsilon: float
    dtype: Any = jnp.float32

    ROLES = Part({"conv_#": CONVOLUTION, "norm_#": NORM, "shortcut": CONVOLUTION})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(group_norm, groups=self.groups, epsilon=self.epsilon)
        h = conv(self.width, dtype=self.dtype, name="conv_1")(nn.silu(norm(x, "norm_1")))  # [B, h, w, width]
        h = conv(self.width, dtype=self.dtype, name="conv_2")(nn.silu(norm(h, "norm_2")))
        if x.shape[-1] != self.width:
            x = conv(self.width, 1, dtype=self.dtype, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Norm and self-attention of all positions with one head, added to the input: [B, h, w, C]."""

    groups: int
    epsilon: float
    dtype: Any = jnp.float32

    ROLES = Part({"norm": NORM, "attention": Attention.ROLES})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = group_norm(x, "norm", groups=self.groups, epsilon=self.epsilon)
        h = h.reshape(batch, height * width, channels)  # [B, N, C]
        h = Attention(heads=1, dtype=self.dtype, name="attention")(h)  # [B, N, C]
        return x + h.reshape(x.shape)


class Level(nn.Module):
    """Residual blocks of one width; `remat` recomputes each of them in the backward pass."""

    width: int
    depth: int
    norm: dict[str, Any]
    dtype: Any
    remat: Remat

    ROLES = Part({"block_#": ResBlock.ROLES})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):  # not a scan, as the first may widen
            x = _remat(ResBlock, self.remat)(self.width, **self.norm, dtype=self.dtype, name=f"block_{i}")(x)
        return constrain(x, "batch", None, None, None)


class Middle(nn.Module):
    """A residual block, attention and a residual block, at the lowest resolution: [B, h, w, C]."""

    norm: dict[str, Any]
    dtype: Any
    remat: Remat

    ROLES = Part({"block_#": ResBlock.ROLES, "attend": AttentionBlock.ROLES})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = _remat(ResBlock, self.remat)
        x = block(x.shape[-1], **self.norm, dtype=self.dtype, name="block_0")(x)
        x = _remat(AttentionBlock, self.remat)(**self.norm, dtype=self.dtype, name="attend")(x)
        x = block(x.shape[-1], **self.norm, dtype=self.dtype, name="block_1")(x)
        return constrain(x, "batch", None, None, None)


def _remat(module: Any, remat: Remat) -> Any:
    return module if remat == "none" else nn.remat(module, policy=REMAT[remat])


class Half(nn.Module):
    """Fields of encoder and decoder: `blocks` at each of the widths, which are in the encoder's order."""

    widths: tuple[int, ...]
    blocks: int
    features: int
    norm: dict[str, Any]
    dtype: Any
    remat: Remat

    ROLES = Part(
        {
            "conv_in": CONVOLUTION,
            "level_#": Level.ROLES,
            "down_#": CONVOLUTION,
            "up_#": CONVOLUTION,
            "middle": Middle.ROLES,
            "norm_out": NORM,
            "conv_out": CONVOLUTION,
        }
    )


class Encoder(Half):
    """x [B, H, W, C] -> [B, H/f, W/f, features]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(self.widths[0], dtype=self.dtype, name="conv_in")(x)  # [B, H, W, D]
        for i, width in enumerate(self.widths):
            x = Level(width, self.blocks, self.norm, self.dtype, self.remat, name=f"level_{i}")(x)
            if i < len(self.widths) - 1:
                padding = ((0, 1), (0, 1))  # at the bottom and the right only
                down = nn.Conv(
                    width, (3, 3), 2, padding, kernel_init=fan_in_uniform, dtype=self.dtype, name=f"down_{i}"
                )
                x = down(x)  # [B, H / 2^(i + 1), W / 2^(i + 1), D]
        x = Middle(self.norm, self.dtype, self.remat, name="middle")(x)  # [B, H/f, W/f, D]
        x = nn.silu(group_norm(x, "norm_out", **self.norm))
        return conv(self.features, dtype=self.dtype, name="conv_out")(x)  # [B, H/f, W/f, features]


class Decoder(Half):
    """z [B, h, w, Z] -> [B, f h, f w, features], with level 0 as the last."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = conv(self.widths[-1], dtype=self.dtype, name="conv_in")(z)  # [B, h, w, D]
        x = Middle(self.norm, self.dtype, self.remat, name="middle")(x)
        for i, width in reversed(list(enumerate(self.widths))):
            x = Level(width, self.blocks, self.norm, self.dtype, self.remat, name=f"level_{i}")(x)
            if i > 0:
                x = upsample(x)  # [B, 2 h, 2 w, D]
                x = conv(width, dtype=self.dtype, name=f"up_{i}")(x)
        x = nn.silu(group_norm(x, "norm_out", **self.norm))  # [B, f h, f w, D]
        return conv(self.features, dtype=self.dtype, name="conv_out")(x)  # [B, f h, f w, features]


class VAE(nn.Module):
    """Autoencoder: an image to the moments of a Gaussian posterior over its latent, and a latent to an image.

    Convolutions are initialised U(-1/sqrt(fan in), 1/sqrt(fan in)), their biases at 0. All outputs are
    float32.

    Raises:
        UserError: if an input does not have `channels` channels, f does not divide its sides, or the widths
            are not multiples of `groups`.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    latent_channels: int = 4
    channels: int = 3
    latent_scale: float | None = 0.18215  # factor of latents; None if it is measured on the data encoded
    epsilon: float = 1e-6  # epsilon of GroupNorm
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"

    @property
    def factor(self) -> int:
        """Ratio f of an image's side to its latent's."""
        return int(2 ** (len(self.widths) - 1))

    def setup(self) -> None:
        """Builds encoder, decoder and the 1x1 convolutions around the latent.

        Raises:
            UserError: if the widths are not multiples of `groups`.
        """
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise UserError(f"widths={self.widths}: must be one or more multiples of groups={self.groups}")
        dtype = jnp.dtype(self.dtype)
        norm = {"groups": self.groups, "epsilon": self.epsilon}
        options: dict[str, Any] = {"norm": norm, "dtype": dtype, "remat": self.remat}
        self.encoder = Encoder(self.widths, self.blocks, 2 * self.latent_channels, **options)
        self.decoder = Decoder(self.widths, self.blocks + 1, self.channels, **options)
        self.quant = conv(2 * self.latent_channels, 1, dtype=dtype, name="quant")
        self.post_quant = conv(self.latent_channels, 1, dtype=dtype, name="post_quant")

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log-variance of the posterior: [B, H, W, C] -> twice [B, H/f, W/f, Z].

        The log-variance is clamped to [-30, 20].
        """
        self._check(x)
        h = self.quant(self.encoder(x)).astype(jnp.float32)  # [B, H/f, W/f, 2Z]
        mean, logvar = jnp.split(h, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns z [B, H/f, W/f, Z]: a sample of the posterior by `key`, or its mean without a key."""
        mean, logvar = self.moments(x)
        return mean if key is None else sample(mean, logvar, key)

    def decode(self, z: jax.Array) -> jax.Array:
        """Decodes latents, [B, h, w, Z] -> [B, f h, f w, C], without clipping to [-1, 1]."""
        return self.decoder(self.post_quant(z)).astype(jnp.float32)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Reconstructs x [B, H, W, C] from a sample of the posterior by `key`, or its mean without a key."""
        return self.decode(self.encode(x, key))

    def _check(self, x: jax.Array) -> None:
        height, width, channels = x.shape[1:]
        if channels != self.channels:
            raise UserError(f"channels={self.channels}: the input has {channels}")
        if height % self.factor or width % self.factor:
            raise UserError(
                f"widths={self.widths}: an input's height and width must be multiples of {self.factor}, "
                f"and are {height}x{width}"
            )


def sample(mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
    """Samples N(mean, exp(logvar)) by reparametrisation (Kingma & Welling 2014, eq. 10): [B, h, w, Z]."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)


def tiled_decode(
    decode: Callable[[jax.Array], jax.Array], z: jax.Array, tile: int = 64, overlap: int = 16
) -> jax.Array:
    """Computes `decode(z)` tile by tile, so that memory is needed for one tile and the image only.

    z [B, h, w, Z] -> [B, f h, f w, C]. Tiles of `tile` latents per side overlap by at least `overlap`, and
    their images are averaged there with weights that fall linearly to the tile's edge. The result differs
    from `decode(z)`: norms and attention see one tile, and convolutions its edges.

    Raises:
        UserError: if `overlap` is negative, or not less than `tile`.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"overlap={overlap}: must be at least 0 and less than tile={tile}")
    batch, height, width, channels = z.shape
    shape = (batch, min(tile, height), min(tile, width), channels)
    image = jax.eval_shape(decode, jax.ShapeDtypeStruct(shape, z.dtype))
    factor = image.shape[1] // shape[1]
    tops, row_weights = _tile_axis(height, shape[1], overlap, factor)
    lefts, column_weights = _tile_axis(width, shape[2], overlap, factor)

    def add_tile(canvas: jax.Array, tile_data: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        top, left, rows, columns = tile_data
        part = decode(jax.lax.dynamic_slice(z, (0, top, left, 0), shape))  # [B, f tile, f tile, C]
        part = part * rows[None, :, None, None] * columns[None, None, :, None]
        corner = (0, top * factor, left * factor, 0)
        part = part + jax.lax.dynamic_slice(canvas, corner, part.shape)
        return jax.lax.dynamic_update_slice(canvas, part, corner), None

    down, across = (i.reshape(-1) for i in np.indices((len(tops), len(lefts))))  # in reading order
    tile_arrays = (tops[down], lefts[across], row_weights[down], column_weights[across])
    canvas = jnp.zeros((batch, height * factor, width * factor, image.shape[-1]), image.dtype)
    return jax.lax.scan(add_tile, canvas, tuple(jnp.asarray(array) for array in tile_arrays))[0]


def _tile_axis(size: int, tile: int, overlap: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the starts of the T tiles along an axis, int32 [T], and their pixels' weights, [T, f tile].

    Tiles are evenly spaced from edge to edge. The weights of all tiles at a pixel sum to 1.
    """
    overlap = min(overlap, tile - 1)
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = np.round(np.linspace(0, size - tile, count)).astype(np.int32)
    ramp = (np.arange(tile * factor) + 0.5) / max(overlap * factor, 0.5)
    window = np.minimum(1.0, np.minimum(ramp, ramp[::-1]))  # [f tile]
    total = np.zeros(size * factor)
    spans = [slice(start * factor, (start + tile) * factor) for start in starts]
    for span in spans:
        total[span] += window
    return starts, np.stack([window / total[span] for span in spans]).astype(np.float32)


def make(variant: str, **options: Any) -> VAE:
    """Returns the autoencoder that `variant` names, e.g. "SD"; `options` override its fields.

    Raises:
        UserError: if the variant or an option is unknown, or a value is not allowed.
    """
    size = dataclasses.asdict(_size(variant))
    *_, channels = size.pop("shape")
    return variants.build(VAE, {**size, "channels": channels}, options)


def inputs(variant: str, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of one example's inputs: x [1, H, W, C]; the option `channels` changes C."""
    *sides, channels = _size(variant).shape
    return {"x": jax.ShapeDtypeStruct((1, *sides, options.get("channels", channels)), jnp.float32)}


def _size(variant: str) -> VAESize:
    if variant not in SIZES:
        raise UserError(f"model.variant={variant!r}: must be one of {', '.join(SIZES)}")
    return SIZES[variant]


FAMILY = Family(
    module=VAE,
    sizes=SIZES,
    variants=VARIANTS,
    roles=Part(
        {
            "encoder": Half.ROLES,
            "decoder": Half.ROLES,
            "quant": CONVOLUTION,
            "post_quant": CONVOLUTION,
        }
    ),
    make=make,
    inputs=inputs,
)
