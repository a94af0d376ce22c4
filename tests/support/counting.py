"""Videos whose pixels count: which video, which frame, which row and column."""

from dataclasses import dataclass

import numpy as np

from scaling.data.sources.base import Columns
from scaling.data.video import begin


@dataclass(frozen=True)
class Counting:
    """Videos of 9 frames, 12 x 20 pixels: every pixel tells its video, frame and column."""

    frames: int
    name: str = "counting"
    num_classes: int = 3
    length: int = 5

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        return self.frames, 12, 20, 3

    def __len__(self) -> int:
        return self.length

    def read(self, indices: np.ndarray) -> Columns:
        return self.at(indices, np.full(len(indices), 0.5))

    def at(self, indices: np.ndarray, places: np.ndarray) -> Columns:
        clips = np.zeros((len(indices), *self.image_shape), np.uint8)
        for i, (index, place) in enumerate(zip(indices, places, strict=True)):
            clips[i, ..., 0] = index
            clips[i, ..., 1] = (begin(place, 9, self.frames) + np.arange(self.frames))[:, None, None]
            clips[i, ..., 2] = np.arange(20)
        return {"image": clips, "label": (indices % 3).astype(np.int32)}
