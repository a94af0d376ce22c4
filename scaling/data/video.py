"""Clips of videos: which frames training and evaluation see, and the views that a result is averaged over.

A clip is T frames uint8 [T, H, W, C], `stride` frames of its video apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from scaling.data.sources import Columns, Source, Wrapped, drawn
from scaling.data.transforms import ORDER, PLACE, TRANSFORMS, Transform, generators, named
from scaling.errors import UserError

if TYPE_CHECKING:
    from scaling.data.options import Data


@dataclass(frozen=True)
class Video:
    """How clips are taken from videos; read of video data alone."""

    frames: int = 8  # of a clip
    stride: int = 1  # frames of the video from one frame of the clip to the next
    shuffle: bool = False  # the frames of every clip: a control, which motion does not survive

    def __post_init__(self) -> None:
        for key in ("frames", "stride"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be at least 1")

    @property
    def span(self) -> int:
        """Frames of the video from the first to the last of a clip, both counted."""
        return (self.frames - 1) * self.stride + 1


@runtime_checkable
class Clips(Source, Protocol):
    """Videos of which a clip can be taken anywhere. Its `read` is the clip in the middle."""

    def at(self, indices: np.ndarray, places: np.ndarray) -> Columns:
        """Clips that begin where `places` [N] say: 0 is a video's first frame, 1 as late as a clip fits."""
        ...


def begin(place: float, length: int, span: int) -> int:
    """The first frame of a clip of `span` frames; uniform `place` in [0, 1) makes every one as likely."""
    room = length - span
    return min(int(place * (room + 1)), room)


@dataclass(frozen=True)
class Sampled(Wrapped):
    """Training sees a clip that begins anywhere, evaluation the one in the middle."""

    source: Clips

    def read(self, indices: np.ndarray) -> Columns:
        return self.source.read(indices)

    def draw(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        return self.source.at(indices, np.array([rng.random() for rng in generators(seed, positions, PLACE)]))


@dataclass(frozen=True)
class Shuffled(Wrapped):
    """Clips with their frames in random order: what is left is what single frames tell."""

    def read(self, indices: np.ndarray) -> Columns:
        return _shuffled(self.source.read(indices), generators(0, indices, ORDER))

    def draw(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        return _shuffled(drawn(self.source, indices, seed, positions), generators(seed, positions, ORDER))


def _shuffled(columns: Columns, rngs: Iterable[np.random.Generator]) -> Columns:
    clips = [clip[rng.permutation(len(clip))] for clip, rng in zip(columns["image"], rngs, strict=True)]
    return {**columns, "image": clips}


# Views


@dataclass(frozen=True)
class Views(Wrapped):
    """Every example seen `temporal` x `spatial` times: row r is view r % (temporal * spatial) of its example.

    In time, clips at even distances from the first to the last that fits (one: the middle); in space, squares
    at both ends and in the middle of the long side, of the size that evaluation's central crop has.
    """

    data: "Data"
    temporal: int
    spatial: int

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        frames, height, width, channels = self.source.image_shape
        side = self.data.image_size
        return (frames, height, width, channels) if side is None else (frames, side, side, channels)

    @property
    def views(self) -> int:
        """Of each example."""
        return self.temporal * self.spatial

    def __len__(self) -> int:
        return len(self.source) * self.views

    def read(self, indices: np.ndarray) -> Columns:
        examples, view = np.divmod(indices, self.views)
        if isinstance(self.source, Clips) and self.temporal > 1:
            columns = self.source.at(examples, view // self.spatial / (self.temporal - 1))
        else:
            columns = self.source.read(examples)
        offsets = np.linspace(0, 1, self.spatial)[view % self.spatial] if self.spatial > 1 else None
        clips = [
            self._cropped(clip, None if offsets is None else float(offsets[i]))
            for i, clip in enumerate(columns["image"])
        ]
        return {**columns, "image": clips}

    def _cropped(self, clip: np.ndarray, offset: float | None) -> np.ndarray:
        where: dict[str, Any] = {} if offset is None else {"offset": offset}
        size, rng = self.data.image_size or 0, np.random.Generator(np.random.Philox(0))  # nothing draws
        for name in self.data.eval_transforms:
            step = named(name)
            clip = np.stack(
                [step.apply(frame, rng, size, **(where if central(step) else {})) for frame in clip]
            )
        return clip


def central(step: Transform) -> bool:
    """Whether a transform crops a central square, which views may move along the long side."""
    return step.number == "short" and not step.random


def check_views(data: "Data", source: Source, temporal: int, spatial: int) -> None:
    """Raises UserError for views that the data do not have."""
    if len(source.image_shape) != 4:
        raise UserError(f"temporal={temporal}: {source.name} holds images; views are of videos")
    if temporal < 1:
        raise UserError(f"temporal={temporal}: must be at least 1")
    if spatial not in (1, 3):
        raise UserError(f"spatial={spatial}: must be 1, the central crop, or 3, along the long side")
    if temporal > 1 and not isinstance(source, Clips):
        raise UserError(f"temporal={temporal}: {source.name} has one clip of each example; use temporal=1")
    if spatial > 1 and not any(central(named(name)) for name in data.eval_transforms):
        crops = ", ".join(name for name, step in TRANSFORMS.items() if central(step))
        raise UserError(f"spatial={spatial}: needs a crop in data.eval_transforms to move: {crops}")
