"""Bad data: npz files, folders of images with captions and of videos, each with one thing wrong."""

import functools
import io
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.bad_files import text_file
from tests.support.data_files import FILES, png
from tests.support.videos import write_video

Write = Callable[[Path], Any]


def _arrays(**changed: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "train_images": rng.integers(0, 255, (32, 8, 8, 1), np.uint8), "train_labels": np.arange(32) % 10,
        "test_images": rng.integers(0, 255, (16, 8, 8, 1), np.uint8), "test_labels": np.arange(16) % 10,
    }  # fmt: skip
    return {key: value for key, value in (arrays | changed).items() if value is not None}


def _npz(**changed: Any) -> Write:
    def write(folder: Path) -> Path:
        np.savez(folder / "a.npz", **_arrays(**changed))
        return folder / "a.npz"

    return write


def _header(shape: str, descr: str = "|u1", length: int = 64) -> bytes:
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(length)


def _members(**members: bytes) -> Write:
    def write(folder: Path) -> Path:
        np.savez(folder / "a.npz", **_arrays(train_images=None))
        with zipfile.ZipFile(folder / "a.npz", "a", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(name.replace("__", "."), content)
        return folder / "a.npz"

    return write


def _cut(part: float) -> Write:
    def write(folder: Path) -> Path:
        path: Path = _npz()(folder)
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        return path

    return write


def bad_npz() -> dict[str, Write]:
    """Returns what writes an npz file into a folder and returns its path, by what is wrong with it."""
    wide = np.zeros((4, 9, 9, 1), np.uint8)

    def npy(folder: Path) -> Path:
        np.save(folder / "a.npy", wide)
        return (folder / "a.npy").rename(folder / "a.npz")

    objects = np.array([{"a": 1}] * 32, dtype=object)
    return {
        "npy": npy,
        "nothing": lambda folder: folder / "none.npz",
        "folder": lambda folder: folder,
        "empty file": text_file("a.npz", b""),
        "text": text_file("a.npz", b"hello"),
        "no train": _npz(train_images=None),
        "no labels": _npz(train_labels=None),
        "no test": _npz(test_images=None, test_labels=None),
        "float images": _npz(train_images=np.zeros((32, 8, 8, 1))),
        "flat": _npz(train_images=np.zeros((32, 64), np.uint8)),
        "few labels": _npz(train_labels=np.arange(3)),
        "float labels": _npz(train_labels=np.zeros(32)),
        "negative": _npz(train_labels=np.arange(32) - 5),
        "text labels": _npz(train_labels=np.array(["a"] * 32)),
        "huge labels": _npz(train_labels=np.arange(32) + 2**40),
        "huge uint": _npz(train_labels=np.arange(32, dtype=np.uint64) + 2**63),
        "many classes": _npz(train_labels=np.arange(32) * 10**8 % 2**31),
        "objects": _npz(train_labels=objects),
        "other size": _npz(test_images=wide, test_labels=np.zeros(4, int)),
        "empty train": _npz(train_images=np.zeros((0, 8, 8, 1), np.uint8), train_labels=np.zeros(0, int)),
        "empty test": _npz(test_images=np.zeros((0, 8, 8, 1), np.uint8), test_labels=np.zeros(0, int)),
        "no pixels": _npz(train_images=np.zeros((32, 0, 8, 1), np.uint8)),
        "channels first": _npz(train_images=np.zeros((32, 3, 8, 8), np.uint8)),
        "header of terabytes": _members(train_images__npy=_header("(1000000000, 1000, 1000, 3)")),
        "header of billions": _members(train_images__npy=_header("(99999999999999999999, 8, 8, 1)")),
        "negative header": _members(train_images__npy=_header("(-1, 8, 8, 1)")),
        "header of code": _members(train_images__npy=_header("__import__('os')")),
        "bad dtype": _members(train_images__npy=_header("(1, 8, 8, 1)", "|x9")),
        "object header": _members(train_images__npy=_header("(1, 8, 8, 1)", "|O")),
        "junk member": _members(train_images__npy=b"junk"),
        "junk beside": _members(notes__txt=b"hello"),
        "half": _cut(0.5),
        "nearly whole": _cut(0.98),
        "begin": _cut(0.01),
    }


def _split(files: dict[str, bytes], test: bool = True) -> Write:
    def write(folder: Path) -> Path:
        for split in ("train", "test") if test else ("train",):
            for name, content in (files if split == "train" else FILES).items():
                (folder / "d" / split / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / "d" / split / name).write_bytes(content)
        return folder / "d"

    return write


def _tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def bad_pairs() -> dict[str, Write]:
    """Returns what writes a folder of images with captions and returns its path, by what is wrong."""
    shard = _tar(FILES)
    plain = {
        "no captions": b"",
        "spaces": b" \n ",
        "latin": b"\xe9\xe8",
        "zeros": b"\0a\0b",
        "entity": b"&nbsp;",
        "controls": "\u0345".encode(),
    }
    images = {"empty": b"", "text": b"hello", "cut": png(3)[:40], "bomb": png(3, (20000, 20000))}
    return {
        "nothing": lambda folder: folder / "none",
        "a file": text_file("d", b"x"),
        "no split": _split({}, test=True),
        **{f"caption {k}": _split({**FILES, "ant.txt": v}) for k, v in plain.items()},
        **{f"image {k}": _split({"ant.png": v, "ant.txt": b"a b"}) for k, v in images.items()},
        "no caption": _split({k: v for k, v in FILES.items() if k != "ant.txt"}),
        "no image": _split({k: v for k, v in FILES.items() if k != "ant.png"}),
        "no test": _split(FILES, test=False),
        "two of a name": _split({**FILES, "ant.jpg": png(1)}),
        **{
            f"archive {kind}": _split({"0.tar": shard, f"1.{kind}": _tar(FILES, "w:gz")})
            for kind in ("tar.gz", "tgz", "tar.zst", "tar.bz2", "zip")
        },
        "cut shard": _split({"0.tar": shard[:3000]}),
        "empty shard": _split({"0.tar": b""}),
        "text shard": _split({"0.tar": b"hello" * 200}),
        "packed shard": _split({"0.tar": _tar(FILES, "w:gz")}),
        "shard of nothing": _split({"0.tar": _tar({})}),
    }


@functools.cache
def _videos() -> Path:
    """Returns a folder of two classes, with two videos of each in either split, made once."""
    folder = Path(tempfile.mkdtemp(prefix="faults-videos-"))
    for i, name in enumerate(f"{split}/{which}" for split in ("train", "test") for which in ("jump", "run")):
        for j in range(2):
            write_video(folder / name / f"{j}.mp4", frames=10 + i + j)
    return folder


def _video_set(change: Callable[[Path], Any]) -> Write:
    def write(folder: Path) -> Path:
        shutil.copytree(_videos(), folder / "d")
        change(folder / "d")
        return folder / "d"

    return write


def _one_video(change: Callable[[Path], Any]) -> Write:
    return _video_set(lambda folder: change(folder / "train/jump/0.mp4"))


def _replaced(old: bytes, new: bytes) -> Write:
    return _one_video(lambda path: path.write_bytes(path.read_bytes().replace(old, new)))


def bad_videos() -> dict[str, Write]:
    """Returns what writes a folder of videos and returns its path, by what is wrong with it."""
    return {
        "nothing": lambda folder: folder / "none",
        "a file": text_file("d", b"x"),
        "empty folder": _video_set(lambda folder: shutil.rmtree(folder) or folder.mkdir()),
        "no train": _video_set(lambda folder: shutil.rmtree(folder / "train")),
        "no test": _video_set(lambda folder: shutil.rmtree(folder / "test")),
        "no classes": _video_set(
            lambda folder: shutil.rmtree(folder / "train") or (folder / "train").mkdir()
        ),
        "class without videos": _video_set(lambda folder: (folder / "train/swim").mkdir()),
        "class without videos in test": _video_set(lambda folder: shutil.rmtree(folder / "test/run")),
        "class of test alone": _video_set(
            lambda folder: shutil.copytree(folder / "test/run", folder / "test/fly")
        ),
        "class with a video's name": _video_set(
            lambda folder: (folder / "train/run").rename(folder / "train/run.mp4")
        ),
        "other suffixes": _video_set(
            lambda folder: [path.rename(path.with_suffix(".3gp")) for path in folder.glob("train/run/*")]
        ),
        "empty": _one_video(lambda path: path.write_bytes(b"")),
        "text": _one_video(lambda path: path.write_bytes(b"hello" * 200)),
        "picture": _one_video(lambda path: path.write_bytes(png(3))),
        "zeros": _one_video(lambda path: path.write_bytes(bytes(4096))),
        "half": _one_video(lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
        "short": _one_video(lambda path: write_video(path, frames=3)),
        "unknown codec": _replaced(b"avc1", b"odd1"),
        "a folder": _one_video(lambda path: path.unlink() or path.mkdir()),
        "link to nothing": _one_video(lambda path: path.unlink() or path.symlink_to("none.mp4")),
    }


def videos_to_train_on() -> dict[str, tuple[Write, str]]:
    """Returns what writes a folder of videos that is trained on, and what is then said of it."""
    return {
        "others beside": (
            _video_set(lambda folder: (folder / "train/run/notes.txt").write_bytes(b"hello")),
            "1 files in it are not read (1 .txt): videos are SPLIT/CLASS/NAME",
        ),
        "text skipped": (bad_videos()["text"], "1 of 4 videos of "),
        "half skipped": (bad_videos()["half"], "1 of 4 videos of "),
        "unknown codec skipped": (bad_videos()["unknown codec"], "1 of 4 videos of "),
        "a title in another encoding": (_replaced(b"Lavf", b"\xe9\xe8\xff\xfe"), ""),
    }
