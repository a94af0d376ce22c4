"""Images with captions in files: a folder of both, or tar shards of them (WebDataset's layout).

`<data_dir>/<split>/` holds `a.jpg` and `a.txt`, `b.png` and `b.txt`, ..., or `*.tar` with such members. Files
belong together that have the same name up to the first dot. Each line of a caption file is a caption. Shards
are not unpacked: their members are found once, and read where they lie.
"""

import functools
import io
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaling.data.folders import SKIP, readable, split_folder
from scaling.data.sources import Columns
from scaling.errors import UserError

if TYPE_CHECKING:
    from scaling.data.options import Data

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Part:
    """Bytes of a file, or of a member of a shard."""

    path: Path
    start: int = 0
    size: int = -1  # -1: to the end
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def bytes(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True)
class FilePairs:
    """A split; images are decoded when they are read."""

    name: str
    images: tuple[Part, ...]
    texts: tuple[Part, ...]
    num_classes: int = 0
    image_shape: tuple[int | None, ...] = (None, None, 3)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> Columns:
        return {"image": [decoded(self.images[index]) for index in indices.tolist()]}

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return [lines(self.texts[index]) for index in indices.tolist()]


def decoded(part: Part) -> np.ndarray:
    """uint8 [H, W, 3]. Raises UserError, naming the file, for what is no image or not a whole one."""
    try:
        return np.asarray(Image.open(io.BytesIO(part.bytes())).convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = str(e).splitlines()[0].split(" <")[0]
        raise UserError(f"{part}: is not a readable image ({reason}); mend it, or {SKIP}") from None


def lines(part: Part) -> tuple[str, ...]:
    """The captions. Raises UserError, naming the file, where it has none, or is not text."""
    try:
        found = tuple(line.strip() for line in part.bytes().decode("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{part}: is not text in UTF-8 ({type(e).__name__}); mend it, or {SKIP}") from None
    if not found:
        raise UserError(f"{part}: has no caption; give it one, or {SKIP}")
    return found


def pair_files(data: "Data", split: str) -> FilePairs:
    """The split of that folder. With `data.unreadable="skip"` every pair is tried once, bad ones listed."""
    folder = split_folder(Path(str(data.data_dir)), split, "pairs and shards")
    return _open(folder, data.unreadable == "skip", data.threads)


@functools.lru_cache(maxsize=4)
def _open(folder: Path, skip: bool, threads: int) -> FilePairs:
    found: dict[str, dict[str, Part]] = defaultdict(dict)
    for key, kind, part in _parts(folder):
        if kind in found[key]:
            raise UserError(f"{part}: has the name of {found[key][kind]}; give each pair its own")
        found[key][kind] = part
    if not found:
        raise UserError(f"data_dir: {folder} has no pairs, such as a.jpg and a.txt, or shards")
    keys = sorted(found)
    if skip:
        keys = readable(keys, lambda key: _read(found[key]), f"pairs of {folder}", threads)
    if not keys:
        raise UserError(f"data_dir: of {len(found)} pairs of {folder} none can be read")
    images, texts = zip(*(_both(found[key]) for key in keys), strict=True)
    return FilePairs(folder.parent.name, images, texts)


def _both(parts: Mapping[str, Part]) -> tuple[Part, Part]:
    """A pair's image and its text. Raises UserError for half a pair."""
    if len(parts) < 2:
        (part,) = parts.values()
        other = "caption" if "image" in parts else "image"
        raise UserError(f"{part}: has no {other} beside it; give both, or {SKIP}")
    return parts["image"], parts["text"]


def _read(parts: Mapping[str, Part]) -> None:
    image, text = _both(parts)
    decoded(image), lines(text)


def _parts(folder: Path) -> Iterator[tuple[str, str, Part]]:
    """(name of the pair, "image" or "text", where it is)."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".tar":
            for part in _members(path):
                yield from _one(f"{path.name}/{part.member}", part)
        elif path.is_file():
            yield from _one(path.relative_to(folder).as_posix(), Part(path))


def _one(name: str, part: Part) -> Iterator[tuple[str, str, Part]]:
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    kind = "image" if suffix in IMAGES else "text" if suffix == ".txt" else None
    if kind is not None and not path.name.startswith("."):
        yield str(path.with_name(path.name.split(".")[0])), kind, part


def _members(path: Path) -> Iterator[Part]:
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield Part(path, member.offset_data, member.size, member.name)
            if Part(path, shard.offset, tarfile.BLOCKSIZE).bytes() != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it does not end as a tar file does")
    except (tarfile.TarError, EOFError) as e:
        raise UserError(f"{path}: is not a whole tar file ({e}); copy it again") from None
