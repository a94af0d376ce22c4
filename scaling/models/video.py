"""What the video families share: tokens on a grid in space and time, and how they start from a ViT.

x is a video [B, T, H, W, C]; D is the width. Tokens stand on a grid of t x h x w, time slowest; s = h w is
the number of places in a frame.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.models.layers import patch_grid, position_grid, resize_positions
from scaling.models.variants import LADDER, Size, side_lengths
from scaling.models.vit import ViT

Grid = tuple[int, int, int]


def video_grid(shape: Sequence[int], tubelet: int, patch: int) -> Grid:
    """(t, h, w): tubelets along time, down and across a video of `shape` [..., T, H, W, C].

    Raises: UserError where `tubelet` does not divide T, or `patch` H and W.
    """
    frames = shape[-4]
    if frames % tubelet:
        raise UserError(f"tubelet={tubelet}: must divide the input's number of frames, which is {frames}")
    return frames // tubelet, *patch_grid(shape, patch)


def tubelets(x: jax.Array, tubelet: int, patch: int) -> jax.Array:
    """[B, T, H, W, C] -> [B, N, tubelet * patch * patch * C] (section 3.2); the pixels too, time slowest."""
    batch, channels = x.shape[0], x.shape[-1]
    t, h, w = video_grid(x.shape, tubelet, patch)
    x = x.reshape(batch, t, tubelet, h, patch, w, patch, channels)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, t * h * w, tubelet * patch**2 * channels)


def resize_grid(table: jax.Array, old: Grid, new: Grid, extra: int = 0) -> jax.Array:
    """A learned table [extra + t * h * w, D] for an `old` grid, resampled for a `new` one.

    Bicubically in space, linearly in time. The first `extra` rows, of class tokens, stay.
    """
    if old == new:
        return table
    width = table.shape[-1]
    frames = table[extra:].reshape(old[0], -1, width)  # [t, h w, D]
    frames = jax.vmap(lambda frame: resize_positions(frame, old[1:], new[1:]))(frames)  # [t, h' w', D]
    frames = jax.image.resize(frames, (new[0], *frames.shape[1:]), "linear")  # [t', h' w', D]
    return jnp.concatenate([table[:extra], frames.reshape(-1, width)])


def to_places(x: jax.Array, frames: int) -> jax.Array:
    """[B, t s, ...] -> [B s, t, ...]: for every place, its tokens along time."""
    batch, tokens, *rest = x.shape
    places = tokens // frames
    return x.reshape(batch, frames, places, *rest).swapaxes(1, 2).reshape(batch * places, frames, *rest)


def from_places(x: jax.Array, places: int) -> jax.Array:
    """[B s, t, ...] -> [B, t s, ...], the inverse of `to_places`."""
    rows, frames, *rest = x.shape
    batch = rows // places
    return x.reshape(batch, places, frames, *rest).swapaxes(1, 2).reshape(batch, frames * places, *rest)


def size_frames(size: Size, published: int) -> int:
    """The frames that a size is meant for: those of the published sizes, or 8 of the small ones."""
    return published if size not in LADDER.values() else 8


def one_video(size: Size, frames: int, options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """x [1, T, H, W, C] of a size; the options `frames` and `resolution` change it."""
    sides = side_lengths(options.get("resolution", size.shape[:2]))
    shape = (1, options.get("frames", frames), *sides, size.shape[2])
    return {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}


# A ViT's parameters


def spatial_positions(
    vit: ViT, vit_params: Mapping[str, Any], new: tuple[int, int]
) -> tuple[jax.Array | None, jax.Array]:
    """A ViT's table as the class token's position [1, D], if it has one, and those of a `new` grid [s, D]."""
    old = position_grid(vit.resolution, vit.patch)
    table, extra = vit_params["positions"], 1 if vit.pool == "token" else 0
    return (table[:1] if extra else None), resize_positions(table[extra:], old, new)
