"""Folders of video files: the right frames from any container, and what is said of files that will not do."""

import dataclasses
import logging
import shutil
import sys
import tempfile
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.data import Data, eval_batches, info, open_source, train_batches, view_batches
from scaling.data.sources.video_folder import read_clip
from scaling.data.video import Video
from scaling.errors import UserError
from tests.support.data_files import png
from tests.support.shardings import sharding
from tests.support.videos import CODECS, shades, write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("test", 2)):
        for name in ("jump", "run"):
            for i in range(count):
                write_video(tmp_path / "films" / split / name / f"{i}.mp4", frames=12 + i, width=32 + 8 * i)
    return tmp_path / "films"


def data_of(folder: Path, unreadable: Literal["fail", "skip"] = "fail", **video: object) -> Data:
    return Data(
        unreadable=unreadable,
        name="video_folder",
        data_dir=str(folder),
        batch_size=8,
        image_size=16,
        train_transforms=("random_crop", "flip"),
        eval_transforms=("center_crop",),
        video=Video(**{"frames": 4, "stride": 2, **video}),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("suffix", CODECS)
def test_a_clip_has_the_frames_that_it_should(suffix: str, tmp_path: Path) -> None:
    """23 frames of known shades: 7 of them, 3 apart, span 19, and so begin at 0 to 4."""
    file = write_video(tmp_path / f"film.{suffix}")
    for place, start in ((0, 0), (0.5, 2), (1, 4)):
        clip = read_clip(file, Video(frames=7, stride=3), place)
        assert clip.shape == (7, 24, 32, 3) and clip.dtype == np.uint8
        assert shades(clip) == list(range(start, 23, 3))[:7]
    assert shades(read_clip(file, Video(frames=1), 1)) == [22]


def test_only_what_a_clip_needs_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, turned = write_video(tmp_path / "film.mp4"), []
    convert = av.VideoFrame.to_ndarray

    class Counted:
        def __getattr__(self, name: str) -> object:
            return getattr(av, name)

        @staticmethod
        def open(path: str, **options: Any) -> object:
            opened = av.open(path, **options)

            class File:
                def __enter__(self) -> "File":
                    return self

                def __exit__(self, *error: object) -> None:
                    opened.close()

                def __getattr__(self, name: str) -> object:
                    return getattr(opened, name)

                def decode(self, stream: object) -> object:
                    for frame in opened.decode(stream):
                        turned.append(shades(convert(frame, format="rgb24")[None])[0])
                        yield frame

            return File()

    monkeypatch.setitem(sys.modules, "av", Counted())
    assert shades(read_clip(file, Video(frames=3), 0.6)) == [12, 13, 14]
    assert turned[-3:] == [12, 13, 14] and len(turned) <= 7  # from a key frame before it to its end


def test_training_evaluation_and_views(folder: Path) -> None:
    data = data_of(folder)
    found = info(data)
    assert (found.name, found.num_classes, found.image_shape) == ("films", 2, (4, 16, 16, 3))
    assert found.train_examples == 6
    batch = next(train_batches(data, 0, 0, sharding(8, 1, 1)))
    assert batch["image"].shape == (8, 4, 16, 16, 3)
    (only,) = eval_batches(data, "test", 8, sharding(8, 1, 1))
    assert only["label"].tolist()[:4] == [0, 0, 1, 1] and float(only["mask"].sum()) == 4
    assert shades(np.asarray(only["image"])[1]) == [3, 5, 7, 9]  # of 13 frames: 7 in the middle
    views = list(view_batches(data, "test", (4, 3), 16, sharding(8, 1, 1)))
    assert sum(float(batch["mask"].sum()) for batch in views) == 4 * 12
    starts = [shades(clip)[0] for clip in np.concatenate([batch["image"] for batch in views])[:12:3]]
    assert starts == [0, 2, 4, 5]  # of 12 frames


def test_worker_processes_read_the_same(folder: Path) -> None:
    data = data_of(folder)
    batches = [
        next(train_batches(each, 1, 0, sharding(8, 1, 1)))
        for each in (data, dataclasses.replace(data, workers=1))
    ]
    np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])


def damage(folder: Path) -> None:
    (folder / "train/jump/0.mp4").write_bytes(b"not a film")
    whole = (folder / "train/run/1.mp4").read_bytes()
    (folder / "train/run/1.mp4").write_bytes(whole[: len(whole) // 2])
    write_video(folder / "train/run/2.mp4", frames=3)


def test_unreadable_files_fail_by_name(folder: Path) -> None:
    damage(folder)
    source = open_source(data_of(folder), "train")
    assert len(source) == 6
    for index, said in (
        (0, r"train/jump/0\.mp4: cannot be decoded \(.*\); repair or remove it, or give data\.unread"),
        (4, r"train/run/1\.mp4: cannot be decoded"),
        (5, r"train/run/2\.mp4: has 3 frames, fewer than the 7 of video\.frames=4 at video\.stride=2; lower"),
    ):
        with pytest.raises(UserError, match=said) as error:
            source.read(np.array([index]))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"\.mp4: "):  # through the loader's threads too
        list(train_batches(data_of(folder), 0, 0, sharding(8, 1, 1)))


def test_unreadable_files_are_skipped_counted_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder)
    data = data_of(folder, unreadable="skip")
    with caplog.at_level(logging.WARNING):
        assert info(data).train_examples == 3
        open_source(data, "train")
    (record,) = caplog.records  # once, not at every opening
    said = record.getMessage()
    assert "3 of 6 videos of " in said and "jump/0.mp4: cannot be decoded" in said and "\n" not in said
    assert "run/1.mp4: " in said and "run/2.mp4: has 3 frames" in said
    assert open_source(data, "train").read(np.arange(3))["label"].tolist() == [0, 0, 1]


def test_folders_that_will_not_do(folder: Path, tmp_path: Path) -> None:
    def error_of(data: Data, split: str) -> str:
        with pytest.raises(UserError) as error:
            open_source(data, split)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "has test, train; folders of classes with videos are looked for in" in error_of(
        data_of(folder), "val"
    )
    assert "no folders" in error_of(data_of(tmp_path / "none"), "train")
    (folder / "train/swim").mkdir()
    (folder / "train/swim/notes.txt").write_text("")
    assert "1 of 3 classes have no videos in train: swim" in error_of(data_of(folder), "train")
    shutil.rmtree(folder / "train/swim")
    (folder / "test/fly").mkdir()
    assert "test/fly is no class: train has no such folder" in error_of(data_of(folder, frames=5), "test")
    (folder / "sound/jump").mkdir(parents=True)
    with av.open(str(folder / "sound/jump/a.mkv"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    with pytest.raises(UserError, match=r"a\.mkv: holds no video"):
        read_clip(folder / "sound/jump/a.mkv", Video(), 0)
    with pytest.raises(UserError, match="data_dir=None: name='video_folder' needs the folder"):
        Data(name="video_folder")


CORNERS = np.zeros((48, 64, 3), np.uint8)  # a picture that looks different from every side
CORNERS[:24, :32], CORNERS[:24, 32:], CORNERS[24:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def write_turned(path: Path, degrees: float, across: bool = False, down: bool = False) -> Path:
    """A video whose container says how to show it: turned anticlockwise, then mirrored."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 4, 1
        stream.set_display_rotation(degrees, hflip=across, vflip=down)
        for _ in range(10):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(CORNERS, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_containers_turn_is_applied(
    suffix: str, degrees: int, mirrored: tuple[bool, bool], tmp_path: Path
) -> None:
    shown = np.rot90(CORNERS, degrees // 90)[:: -1 if mirrored[1] else 1, :: -1 if mirrored[0] else 1]
    file = write_turned(tmp_path / f"film.{suffix}", degrees, *mirrored)
    for place in (0, 1):
        clip = read_clip(file, Video(frames=2, stride=3), place)
        assert clip.shape == (2, *shown.shape)
        assert np.abs(clip - shown.astype(float)).mean(axis=(1, 2, 3)).max() < 8


def test_any_other_turn_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"film\.mp4: is to be shown turned by -30 degrees, and only quarter"):
        read_clip(write_turned(tmp_path / "film.mp4", 30), Video(frames=2), 0)


def test_a_turn_beside_what_pyav_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side data of a kind without a name make PyAV raise; it gives the angle all the same."""
    file = write_turned(tmp_path / "film.mp4", 90)

    class Frame:
        def __init__(self, frame: av.VideoFrame) -> None:
            self.frame, self.rotation = frame, frame.rotation
            self.pts, self.to_ndarray = frame.pts, frame.to_ndarray

        @property
        def side_data(self) -> object:
            raise ValueError("30 is not a valid Type")

    decode = av.container.InputContainer.decode

    class File:
        def __init__(self, path: str, **options: Any) -> None:
            self.opened = av_open(path, **options)

        def __enter__(self) -> "File":
            return self

        def __exit__(self, *error: object) -> None:
            self.opened.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.opened, name)

        def decode(self, stream: object) -> object:
            return (Frame(frame) for frame in decode(self.opened, stream))

    av_open = av.open
    monkeypatch.setattr(av, "open", File)
    clip = read_clip(file, Video(frames=2), 0)
    assert np.abs(clip[0] - np.rot90(CORNERS).astype(float)).mean() < 8


def test_files_that_are_no_videos_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train/jump/deep").mkdir()
    for name in ("jump/a.3gp", "jump/b.3gp", "run/notes.txt", "jump/.DS_Store", "jump/deep/c.mp4", "d.mp4"):
        (folder / "train" / name).write_bytes(b"")
    (folder / "train/run/0.mp4").rename(folder / "train/run/0.MP4")
    with caplog.at_level(logging.WARNING):
        assert info(data_of(folder)).train_examples == 6
        open_source(data_of(folder), "test")
    (record,) = caplog.records
    said = record.getMessage()
    assert "train: 5 files in it are not read (2 .mp4, 2 .3gp, 1 .txt): videos are SPLIT/CLASS/NAME" in said


def test_titles_in_any_encoding_are_no_matter(tmp_path: Path) -> None:
    file = write_video(tmp_path / "film.mkv")
    assert file.read_bytes().count(b"Lavf") > 1  # the program that wrote it is a title, too
    file.write_bytes(file.read_bytes().replace(b"Lavf", "Žižk".encode("iso8859_2")))
    assert shades(read_clip(file, Video(frames=3), 0)) == [0, 1, 2]


def test_a_codec_without_a_decoder_is_named(tmp_path: Path) -> None:
    file = write_video(tmp_path / "film.mp4")
    file.write_bytes(file.read_bytes().replace(b"avc1", b"odd1"))
    with pytest.raises(
        UserError, match=r"film\.mp4: is of a codec that FFmpeg here has no decoder for; repair"
    ):
        read_clip(file, Video(frames=3), 0)


def test_frames_of_two_sizes_are_no_clip(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "film.mov"), "w") as file:
        stream = file.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 6, 5, "rgb24"
        for i in range(6):
            packet = av.Packet(png(10 * i, (6, 5) if i < 3 else (4, 5)))
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 10), i, i
            packet.is_keyframe = True
            file.mux(packet)
    assert shades(read_clip(tmp_path / "film.mov", Video(frames=3), 0)) == [0, 1, 2]
    with pytest.raises(
        UserError, match=r"film\.mov: the frames of a clip differ in size; repair or remove it"
    ):
        read_clip(tmp_path / "film.mov", Video(frames=3), 0.5)


@cache
def whole(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_video(Path(folder) / f"film.{suffix}", frames=8).read_bytes()


@pytest.mark.parametrize("suffix", CODECS)
@given(st.lists(st.tuples(st.integers(-900, 900), st.integers(0, 255)), max_size=4), st.booleans())
@settings(max_examples=60)
def test_a_damaged_video_is_read_or_refused(suffix: str, changes: list[tuple[int, int]], cut: bool) -> None:
    """Headers are at both ends. Of a whole file the frames are the right ones."""
    content = bytearray(whole(suffix))
    for place, value in changes:
        content[place % len(content)] = value
    if cut:
        del content[len(content) * 2 // 3 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"film.{suffix}"
        path.write_bytes(content)
        try:
            clip = read_clip(path, Video(frames=3, stride=2), 1)
        except UserError as e:
            assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
            assert content != whole(suffix)
            return
    assert clip.shape[0::3] == (3, 3) and clip.dtype == np.uint8 and clip.size
    if content == whole(suffix):
        assert shades(clip) == [3, 5, 7]
