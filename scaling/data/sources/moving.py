"""Clips made from real digits or garments that move: a label is the item together with its motion.

An image of S x S pixels moves on a torus: pixels that leave at one edge come in at the other. Its start is
uniform over the S x S places, and so is its place at every later time, whatever the motion: no single frame
tells anything about the motion. Frames in an unknown order tell the line along which the image moves, but not
the direction: the motion is then one of two, and is recognised at most half of the time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from scaling.data.sources.base import ArraySource, Columns
from scaling.data.transforms import HELD, PLACE, generators

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
    """A source of one clip per image: the same in every evaluation, with new motion and start in training."""

    items: ArraySource
    frames: int
    stride: int

    @property
    def name(self) -> str:
        return f"moving_{self.items.name}"

    @property
    def factors(self) -> dict[str, int]:
        """The factors of a label with their sizes, the last one fastest: label = item * 8 + motion."""
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

    def read_train(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        return self._clips(indices, generators(seed, positions, PLACE))

    def _clips(self, indices: np.ndarray, rngs: Iterable[np.random.Generator]) -> Columns:
        height, width, _ = self.items.image_shape
        draws = [rng.integers((len(MOTIONS), height, width)) for rng in rngs]
        motions, tops, lefts = np.array(draws).T  # [N] each
        return {
            "image": moved(self.items.images[indices], motions, tops, lefts, self.frames, self.stride),
            "label": (self.items.labels[indices] * len(MOTIONS) + motions).astype(np.int32),
        }


def moved(
    images: np.ndarray, motions: np.ndarray, tops: np.ndarray, lefts: np.ndarray, frames: int, stride: int
) -> np.ndarray:
    """Returns clips [N, T, H, W, C] of images [N, H, W, C] that move.

    The first frame is shifted by `tops` and `lefts` [N] pixels; `motions` [N] index `MOTIONS`.
    """
    n, height, width, _ = images.shape
    steps = np.array(list(MOTIONS.values()))[motions][:, None] * (np.arange(frames) * stride)[:, None]
    rows = (np.arange(height) - (tops[:, None] + steps[..., 0])[..., None]) % height  # [N, T, H]
    columns = (np.arange(width) - (lefts[:, None] + steps[..., 1])[..., None]) % width  # [N, T, W]
    return images[np.arange(n)[:, None, None, None], rows[..., :, None], columns[..., None, :]]
