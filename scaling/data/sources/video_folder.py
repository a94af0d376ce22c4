"""Folders of video files, `root/split/class/*.mp4`, of which PyAV (FFmpeg) decodes only what a clip needs."""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaling.data.folders import SKIP, files, folders, readable, say_unread, split_folder
from scaling.data.sources.base import Columns
from scaling.data.video import Video, begin
from scaling.errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".wmv", ".flv")
READ = f"videos are SPLIT/CLASS/NAME, where NAME ends in {', '.join(SUFFIXES)}"


@dataclass(frozen=True, eq=False)
class VideoFolder:
    """A split, with its files in order of class and name. Videos may differ in length and in size."""

    name: str
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: np.ndarray  # int32 [N]
    video: Video

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, None, None, int]:
        return self.video.frames, None, None, 3

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> Columns:
        return self.at(indices, np.full(len(indices), 0.5))

    def at(self, indices: np.ndarray, places: np.ndarray) -> Columns:
        clips = [
            read_clip(self.files[index], self.video, place)
            for index, place in zip(indices.tolist(), places.tolist(), strict=True)
        ]
        return {"image": clips, "label": self.labels[indices]}


@functools.lru_cache(maxsize=8)
def video_folder(
    root: Path, split: str, train_split: str, video: Video, skip: bool, threads: int
) -> VideoFolder:
    """Returns a split of your own videos, `data_dir/split/class/*.mp4` (or .mkv, .webm, .avi and others).

    The classes are the folders of `train_split`, in alphabetical order. With `skip` a clip of every file is
    read once, and files for which that fails are left out; the log names them. The log also counts files that
    are not read because of their suffix or place.

    Raises:
        UserError: if a folder is missing, a folder of the split is not a class, or a class has no videos.
    """
    classes = _class_folders(root, train_split)
    for name in _class_folders(root, split):
        if name not in classes:
            raise UserError(
                f"data.data_dir={str(root)!r}: {split}/{name} is no class: {train_split} has no such folder"
            )
    entries = [
        (file, label) for label, name in enumerate(classes) for file in _video_files(root / split / name)
    ]
    videos = {file for file, _ in entries}
    say_unread(root / split, (str(file) for file in files(root / split) if file not in videos), READ)
    if skip:
        # The last clip is tried, which a truncated file does not have.
        entries = readable(
            entries, lambda entry: read_clip(entry[0], video, 1.0), f"videos of {root / split}", threads
        )
    labels = np.array([label for _, label in entries], np.int32)
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise UserError(
            f"data.data_dir={str(root)!r}: {len(empty)} of {len(classes)} classes have no videos in {split}: "
            f"{', '.join(empty)}; add some, or remove the folders"
        )
    return VideoFolder(root.resolve().name, tuple(classes), tuple(file for file, _ in entries), labels, video)


def _class_folders(root: Path, split: str) -> list[str]:
    names = folders(split_folder(root, split, "folders of classes with videos"))
    if not names:
        raise UserError(f"split {split!r}: {root / split} holds no folders of classes")
    return names


def _video_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


def read_clip(path: Path, video: Video, place: float) -> np.ndarray:
    """Returns the clip uint8 [T, H, W, 3] that begins at `place`: 0 is the first frame, 1 the last start.

    The times of all frames are read first, without decoding, so that frames are counted exactly whatever the
    frame rate. Then frames are decoded from the last key frame before the clip to the clip's end. They are
    turned as the container says, which may swap the sides: phones store videos in the sensor's orientation.

    Raises:
        UserError: if the file is not a video, is damaged or shorter than the clip, or changes its size.
    """
    import av

    advice = f"repair or remove it, or {SKIP}"
    try:
        with av.open(str(path), metadata_errors="replace") as file:  # titles may be in any encoding
            if not file.streams.video:
                raise UserError(f"{path}: holds no video; {advice}")
            stream = file.streams.video[0]
            if stream.codec_context is None:
                raise UserError(f"{path}: is of a codec that FFmpeg here has no decoder for; {advice}")
            stream.codec_context.thread_count = 1  # the loader's threads already read several files
            times = sorted(packet.pts for packet in file.demux(stream) if packet.pts is not None)
            if len(times) < video.span:
                raise UserError(
                    f"{path}: has {len(times)} frames, fewer than the {video.span} of video.frames="
                    f"{video.frames} at video.stride={video.stride}; lower these, or {advice}"
                )
            first = begin(place, len(times), video.span)
            clip_times = times[first : first + video.span : video.stride]
            frames = _decode_frames(file, stream, clip_times, clip_times[0])
            if len(frames) < len(clip_times):  # some containers seek to a key frame that is too late
                frames = _decode_frames(file, stream, clip_times, times[0])
    except (av.error.FFmpegError, OSError) as e:
        raise UserError(f"{path}: cannot be decoded ({e.strerror or e}); {advice}") from None
    if len(frames) < len(clip_times):
        raise UserError(f"{path}: {len(clip_times) - len(frames)} frames of a clip are missing; {advice}")
    if len({frame.shape for frame in frames.values()}) > 1:
        raise UserError(f"{path}: the frames of a clip differ in size; {advice}")
    return np.stack([frames[time] for time in clip_times])


def _decode_frames(file: Any, stream: Any, times: Sequence[int], since: int) -> dict[int, np.ndarray]:
    """Decodes from the key frame before `since`, and returns those frames at `times` that occur, by time."""
    file.seek(since, stream=stream)
    frames: dict[int, np.ndarray] = {}
    for frame in file.decode(stream):
        i = -1 if frame.pts is None else bisect.bisect_left(times, frame.pts)
        if 0 <= i < len(times) and times[i] == frame.pts:
            frames[frame.pts] = _upright(frame, file.name)
        if len(frames) == len(times):
            break
    return frames


def _upright(frame: Any, path: str) -> np.ndarray:
    """Returns a frame turned as it is to be displayed, uint8 [H, W, 3].

    A display matrix [[a, b, u], [c, d, v], [x, y, w]] shows the pixel that lies p to the right and q down at
    (a p + c q + x, b p + d q + y), as FFmpeg's libavutil/display.h defines it.

    Raises:
        UserError: if the video is turned by an angle that is not a multiple of 90 degrees.
    """
    pixels = frame.to_ndarray(format="rgb24")
    (a, b), (c, d) = _display_matrix(frame).tolist()
    straight, crossed = abs(a) + abs(d), abs(b) + abs(c)
    if min(straight, crossed) > 0.02 * max(straight, crossed):  # more than a degree
        angle = math.degrees(math.atan2(b, a))
        raise UserError(
            f"{path}: is to be shown turned by {angle:.0f} degrees, and only quarter turns are read; turn it "
            f"yourself, or {SKIP}"
        )
    if crossed > straight:
        pixels, right, down = pixels.swapaxes(0, 1), c, b
    else:
        right, down = a, d
    return pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def _display_matrix(frame: Any) -> np.ndarray:
    """Returns the part [2, 2] of a frame's display matrix that turns and mirrors it."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV fails on side data of a kind that it does not know, but still gives the angle
        angle = math.radians(frame.rotation)  # anticlockwise
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.eye(2) if data is None else np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2]
