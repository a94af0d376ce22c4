"""Clips made from real digits or garments that move: a label is which one it is, and where it moves.

An image of S x S pixels moves on a torus: what leaves at one edge comes in at the other. It starts anywhere,
each of the S x S places as likely, so that it is anywhere at every later time too, whatever the motion: one
frame, whichever it is, tells nothing of the motion. Frames in any order tell the line along which it moves,
but not which way: of the 8 motions at most half can then be told.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scaling.data import sources
from scaling.data.sources import ArraySource, Columns
from scaling.data.transforms import HELD, PLACE, generators

if TYPE_CHECKING:
    from scaling.data.options import Data

MOTIONS = {  # name -> pixels (down, right) from a frame of the video to the next
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
    "up left": (-1, -1),
    "down right": (1, 1),
    "up right": (-1, 1),
    "down left": (1, -1),
}


@dataclass(frozen=True)
class Moving:
    """A clip of each image: for evaluation always the same, for training a new motion and start each time."""

    items: ArraySource
    frames: int
    stride: int

    @property
    def name(self) -> str:
        return f"moving_{self.items.name}"

    @property
    def factors(self) -> dict[str, int]:
        """What a label is a product of, the last factor fastest: label = item * 8 + motion."""
        return {"item": self.items.num_classes, "motion": len(MOTIONS)}

    @property
    def num_classes(self) -> int:
        return self.items.num_classes * len(MOTIONS)

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        return (self.frames, *self.items.image_shape)

    def __len__(self) -> int:
        return len(self.items)

    def read(self, indices: np.ndarray) -> Columns:
        return self._clips(indices, generators(0, indices, HELD))

    def draw(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        return self._clips(indices, generators(seed, positions, PLACE))

    def _clips(self, indices: np.ndarray, rngs: Iterable[np.random.Generator]) -> Columns:
        height, width, _ = self.items.image_shape
        drawn = [rng.integers((len(MOTIONS), height, width)) for rng in rngs]
        motions, tops, lefts = np.array(drawn).T  # [N] each
        return {
            "image": moved(self.items.images[indices], motions, tops, lefts, self.frames, self.stride),
            "label": (self.items.labels[indices] * len(MOTIONS) + motions).astype(np.int32),
        }


def moved(
    images: np.ndarray, motions: np.ndarray, tops: np.ndarray, lefts: np.ndarray, frames: int, stride: int
) -> np.ndarray:
    """Clips [N, T, H, W, C] of images [N, H, W, C], shifted by (top, left) [N] at first, with motions [N]."""
    n, height, width, _ = images.shape
    steps = np.array(list(MOTIONS.values()))[motions][:, None] * (np.arange(frames) * stride)[:, None]
    rows = (np.arange(height) - (tops[:, None] + steps[..., 0])[..., None]) % height  # [N, T, H]
    columns = (np.arange(width) - (lefts[:, None] + steps[..., 1])[..., None]) % width  # [N, T, W]
    return images[np.arange(n)[:, None, None, None], rows[..., :, None], columns[..., None, :]]


def moving_mnist(data: "Data", split: str) -> Moving:
    """Clips of `mnist`'s digits, 10 items by 8 motions; the test digits are not those of training."""
    return Moving(sources.mnist(data, split), data.video.frames, data.video.stride)


def moving_fashion_mnist(data: "Data", split: str) -> Moving:
    """Clips of `fashion_mnist`'s garments, 10 items by 8 motions; the test garments are not training's."""
    return Moving(sources.fashion_mnist(data, split), data.video.frames, data.video.stride)
