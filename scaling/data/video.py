"""Clips of videos: the frames that training and evaluation see, and the views that results are averaged over.

A clip is T frames uint8 [T, H, W, C], `stride` frames of its video apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from scaling.data.sources.base import Columns, Source, Wrapped, read_train
from scaling.data.transforms import ORDER, PLACE, TRANSFORMS, Transform, generators, named
from scaling.errors import UserError


@dataclass(frozen=True)
class Video:
    """How clips are taken from videos; only video data sets read these options."""

    frames: int = 8  # frames per clip
    stride: int = 1  # distance between frames of the clip, in frames of the video
    shuffle: bool = False  # whether the frames of every clip are shuffled: a control, which destroys motion

    def __post_init__(self) -> None:
        for key in ("frames", "stride"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be at least 1")

    @property
    def span(self) -> int:
        """The number of frames of the video from a clip's first to its last, both included."""
        return (self.frames - 1) * self.stride + 1


@runtime_checkable
class Clips(Source, Protocol):
    """A source of videos of which a clip can be taken anywhere; `read` gives the clip in the middle."""

    def at(self, indices: np.ndarray, places: np.ndarray) -> Columns:
        """Returns clips that begin at `places` [N]: 0 is a video's first frame, 1 the last possible start."""
        ...


def begin(place: float, length: int, span: int) -> int:
    """Returns the first frame of a clip of `span` frames, uniform over all starts for `place` in [0, 1)."""
    room = length - span
    return min(int(place * (room + 1)), room)


@dataclass(frozen=True)
class Sampled(Wrapped):
    """A source of single clips: training sees one that begins anywhere, evaluation the one in the middle."""

    source: Clips

    def read(self, indices: np.ndarray) -> Columns:
        return self.source.read(indices)

    def read_train(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        return self.source.at(indices, np.array([rng.random() for rng in generators(seed, positions, PLACE)]))


@dataclass(frozen=True)
class Shuffled(Wrapped):
    """A source of clips with their frames in random order, so that only single frames carry information."""

    def read(self, indices: np.ndarray) -> Columns:
        return _shuffle_frames(self.source.read(indices), generators(0, indices, ORDER))

    def read_train(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        return _shuffle_frames(
            read_train(self.source, indices, seed, positions), generators(seed, positions, ORDER)
        )


def _shuffle_frames(columns: Columns, rngs: Iterable[np.random.Generator]) -> Columns:
    clips = [clip[rng.permutation(len(clip))] for clip, rng in zip(columns["image"], rngs, strict=True)]
    return {**columns, "image": clips}


# Views


@dataclass(frozen=True)
class ClipViews(Wrapped):
    """A source with `num_clips` x `num_crops` views of every example of another.

    Row r is view r % (num_clips * num_crops) of its example; crops vary fastest.

    Clips lie at even distances in time from the first to the last that fits (a single one in the middle).
    Crops are squares at both ends and in the middle of the long side, as large as evaluation's central crop.
    """

    num_clips: int
    num_crops: int
    side: int | None  # side of a crop in pixels; None: clips are not cropped
    transforms: tuple[str, ...]  # names of the transforms of evaluation

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        frames, height, width, channels = self.source.image_shape
        side = self.side
        return (frames, height, width, channels) if side is None else (frames, side, side, channels)

    @property
    def views(self) -> int:
        """The number of views of each example."""
        return self.num_clips * self.num_crops

    def __len__(self) -> int:
        return len(self.source) * self.views

    def read(self, indices: np.ndarray) -> Columns:
        examples, view = np.divmod(indices, self.views)
        if isinstance(self.source, Clips) and self.num_clips > 1:
            columns = self.source.at(examples, view // self.num_crops / (self.num_clips - 1))
        else:
            columns = self.source.read(examples)
        offsets = np.linspace(0, 1, self.num_crops)[view % self.num_crops] if self.num_crops > 1 else None
        clips = [
            self._crop(clip, None if offsets is None else float(offsets[i]))
            for i, clip in enumerate(columns["image"])
        ]
        return {**columns, "image": clips}

    def _crop(self, clip: np.ndarray, offset: float | None) -> np.ndarray:
        """Applies the transforms to each frame, with central crops moved to `offset` along the long side."""
        options: dict[str, Any] = {} if offset is None else {"offset": offset}
        size, rng = self.side or 0, np.random.Generator(np.random.Philox(0))  # no transform draws from it
        for name in self.transforms:
            step = named(name)
            clip = np.stack(
                [step.apply(frame, rng, size, **(options if central(step) else {})) for frame in clip]
            )
        return clip


def central(step: Transform) -> bool:
    """Returns whether a transform crops a central square, which views may move along the long side."""
    return step.number == "short" and not step.random


def check_views(source: Source, num_clips: int, num_crops: int, transforms: tuple[str, ...]) -> None:
    """Checks that the source, cropped by these `transforms`, has these views.

    Raises:
        UserError: if it does not, or a number of views is out of range.
    """
    if len(source.image_shape) != 4:
        raise UserError(f"num_clips={num_clips}: {source.name} holds images; views are of videos")
    if num_clips < 1:
        raise UserError(f"num_clips={num_clips}: must be at least 1")
    if num_crops not in (1, 3):
        raise UserError(f"num_crops={num_crops}: must be 1, the central crop, or 3, along the long side")
    if num_clips > 1 and not isinstance(source, Clips):
        raise UserError(f"num_clips={num_clips}: {source.name} has one clip of each example; use num_clips=1")
    if num_crops > 1 and not any(central(named(name)) for name in transforms):
        crops = ", ".join(name for name, step in TRANSFORMS.items() if central(step))
        raise UserError(f"num_crops={num_crops}: needs a crop in data.eval_transforms to move: {crops}")
