"""Folders of video files, `root/split/class/*.mp4`, decoded by PyAV (FFmpeg): only what a clip needs."""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.data.folders import SKIP, files, folders, readable, say_unread, split_folder
from scaling.data.sources import Columns
from scaling.data.video import Video, begin
from scaling.errors import UserError

if TYPE_CHECKING:
    from scaling.data.options import Data

SUFFIXES = (".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".wmv", ".flv")
READ = f"videos are SPLIT/CLASS/NAME, where NAME ends in {', '.join(SUFFIXES)}"


@dataclass(frozen=True, eq=False)
class VideoFolder:
    """A split: the files in order of class and name. Videos may differ in length and in size."""

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


def video_folder(data: "Data", split: str) -> VideoFolder:
    """Your own videos: files `data_dir/split/class/*.mp4` (or .mkv, .webm, .avi, .mov and others).

    The classes are the folders of `train_split`, in alphabetical order. With `unreadable="skip"` a clip
    of every file is tried once, and files that give none are named in the log and left out. The log counts
    files of other kinds or in other places too.
    """
    skip = data.unreadable == "skip"
    return _opened(Path(str(data.data_dir)), split, data.train_split, data.video, skip, data.threads)


@functools.lru_cache(maxsize=8)
def _opened(root: Path, split: str, train_split: str, video: Video, skip: bool, threads: int) -> VideoFolder:
    classes, here = _folders(root, train_split), _folders(root, split)
    for name in here:
        if name not in classes:
            raise UserError(
                f"data_dir={str(root)!r}: {split}/{name} is no class: {train_split} has no such folder"
            )
    found = [(file, label) for label, name in enumerate(classes) for file in _files(root / split / name)]
    read = {file for file, _ in found}
    say_unread(root / split, (str(file) for file in files(root / split) if file not in read), READ)
    if skip:
        # The last clip: a file that was cut short does not have it.
        found = readable(
            found, lambda entry: read_clip(entry[0], video, 1.0), f"videos of {root / split}", threads
        )
    labels = np.array([label for _, label in found], np.int32)
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise UserError(
            f"data_dir={str(root)!r}: {len(empty)} of {len(classes)} classes have no videos in {split}: "
            f"{', '.join(empty)}; add some, or remove the folders"
        )
    return VideoFolder(root.resolve().name, tuple(classes), tuple(file for file, _ in found), labels, video)


def _folders(root: Path, split: str) -> list[str]:
    names = folders(split_folder(root, split, "folders of classes with videos"))
    if not names:
        raise UserError(f"split {split!r}: {root / split} holds no folders of classes")
    return names


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


def read_clip(path: Path, video: Video, place: float) -> np.ndarray:
    """The clip uint8 [T, H, W, 3] that begins at a share `place` of the room that the video leaves.

    Times of all frames are read first, without decoding, so that frame i is frame i whatever the rate; then
    frames are decoded from the last key frame before the clip to its end. They are turned as the container
    says, which may swap the sides: phones store every video as the sensor lies.

    Raises: UserError for a file that is no video, is damaged, or is shorter than the clip.
    """
    import av

    advice = f"repair or remove it, or {SKIP}"
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise UserError(f"{path}: holds no video; {advice}")
            stream = file.streams.video[0]
            stream.codec_context.thread_count = 1  # the loader's own threads read other files
            times = sorted(packet.pts for packet in file.demux(stream) if packet.pts is not None)
            if len(times) < video.span:
                raise UserError(
                    f"{path}: has {len(times)} frames, fewer than the {video.span} of video.frames="
                    f"{video.frames} at video.stride={video.stride}; lower these, or {advice}"
                )
            first = begin(place, len(times), video.span)
            wanted = times[first : first + video.span : video.stride]
            frames = _decoded(file, stream, wanted, wanted[0])
            if len(frames) < len(wanted):  # a container may seek to a key frame that is too late
                frames = _decoded(file, stream, wanted, times[0])
    except (av.error.FFmpegError, OSError) as e:
        raise UserError(f"{path}: cannot be decoded ({e.strerror or e}); {advice}") from None
    if len(frames) < len(wanted):
        raise UserError(f"{path}: {len(wanted) - len(frames)} frames of a clip are missing; {advice}")
    return np.stack([frames[time] for time in wanted])


def _decoded(file: Any, stream: Any, wanted: Sequence[int], since: int) -> dict[int, np.ndarray]:
    """The frames at `wanted` times that are found when decoding from a key frame before `since`."""
    file.seek(since, stream=stream)
    frames: dict[int, np.ndarray] = {}
    for frame in file.decode(stream):
        i = -1 if frame.pts is None else bisect.bisect_left(wanted, frame.pts)
        if 0 <= i < len(wanted) and wanted[i] == frame.pts:
            frames[frame.pts] = _turned(frame, file.name)
        if len(frames) == len(wanted):
            break
    return frames


def _turned(frame: Any, path: str) -> np.ndarray:
    """Returns a frame as it is to be shown, uint8 [H, W, 3].

    A display matrix [[a, b, u], [c, d, v], [x, y, w]] shows the pixel that lies p to the right and q down at
    (a p + c q + x, b p + d q + y), as FFmpeg's libavutil/display.h defines it.

    Raises: UserError for a video that is turned by something else than quarters.
    """
    pixels = frame.to_ndarray(format="rgb24")
    (a, b), (c, d) = _matrix(frame).tolist()
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


def _matrix(frame: Any) -> np.ndarray:
    """Returns the part of a frame's display matrix that turns and mirrors it, [2, 2]."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know a kind of side data beside it, and then gives the angle alone
        angle = math.radians(frame.rotation)  # anticlockwise
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.eye(2) if data is None else np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2]
