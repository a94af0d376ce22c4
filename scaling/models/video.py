"""Parts shared by the video families: tokens on a grid in space and time, and initialisation from a ViT.

x is a video [B, T, H, W, C]; D is the width. Tokens stand on a grid of t x h x w, time slowest; s = h w is
the number of places in a frame.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.models.layers import patch_grid, position_grid, resize_positions
from scaling.models.variants import LADDER, TransformerSize, side_lengths
from scaling.models.vit import ViT

Grid = tuple[int, int, int]


def video_grid(shape: Sequence[int], tubelet: int, patch: int) -> Grid:
    """Returns (t, h, w): tubelets along time, down and across a video of `shape` [..., T, H, W, C].

    Raises:
        UserError: if `tubelet` does not divide T, or `patch` does not divide H and W.
    """
    frames = shape[-4]
    if frames % tubelet:
        raise UserError(f"tubelet={tubelet}: must divide the input's number of frames, which is {frames}")
    return frames // tubelet, *patch_grid(shape, patch)


def tubelets(x: jax.Array, tubelet: int, patch: int) -> jax.Array:
    """Splits [B, T, H, W, C] -> [B, N, tubelet * patch * patch * C] (section 3.2).

    Both tubelets and the pixels within them are in the order of time (slowest), row and column.
    """
    batch, channels = x.shape[0], x.shape[-1]
    t, h, w = video_grid(x.shape, tubelet, patch)
    x = x.reshape(batch, t, tubelet, h, patch, w, patch, channels)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, t * h * w, tubelet * patch**2 * channels)


def resize_grid(table: jax.Array, old: Grid, new: Grid, extra: int = 0) -> jax.Array:
    """Resamples a learned table [extra + t * h * w, D] for an `old` grid for a `new` one.

    It is resampled bicubically in space, linearly in time. The first `extra` rows, of class tokens, are
    unchanged.
    """
    if old == new:
        return table
    width = table.shape[-1]
    frames = table[extra:].reshape(old[0], -1, width)  # [t, h w, D]
    frames = jax.vmap(lambda frame: resize_positions(frame, old[1:], new[1:]))(frames)  # [t, h' w', D]
    frames = jax.image.resize(frames, (new[0], *frames.shape[1:]), "linear")  # [t', h' w', D]
    return jnp.concatenate([table[:extra], frames.reshape(-1, width)])


def to_places(x: jax.Array, frames: int) -> jax.Array:
    """Groups tokens by place, in the order of time: [B, t s, ...] -> [B s, t, ...]."""
    batch, tokens, *rest = x.shape
    places = tokens // frames
    return x.reshape(batch, frames, places, *rest).swapaxes(1, 2).reshape(batch * places, frames, *rest)


def from_places(x: jax.Array, places: int) -> jax.Array:
    """Undoes `to_places`: [B s, t, ...] -> [B, t s, ...]."""
    rows, frames, *rest = x.shape
    batch = rows // places
    return x.reshape(batch, places, frames, *rest).swapaxes(1, 2).reshape(batch, frames * places, *rest)


def size_frames(size: TransformerSize, published: int) -> int:
    """Returns the number of frames that a size is meant for: `published`, or 8 for the small sizes."""
    return published if size not in LADDER.values() else 8


def one_video(
    size: TransformerSize, frames: int, options: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of x [1, T, H, W, C] of a size; the options `frames` and `resolution` change it."""
    sides = side_lengths(options.get("resolution", size.shape[:2]))
    shape = (1, options.get("frames", frames), *sides, size.shape[2])
    return {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}


# A ViT's parameters


def spatial_positions(
    vit: ViT, vit_params: Mapping[str, Any], new: tuple[int, int]
) -> tuple[jax.Array | None, jax.Array]:
    """Returns a ViT's class token's position [1, D], if it has one, and positions for a `new` grid [s, D]."""
    old = position_grid(vit.resolution, vit.patch)
    table, extra = vit_params["positions"], 1 if vit.pool == "token" else 0
    return (table[:1] if extra else None), resize_positions(table[extra:], old, new)
