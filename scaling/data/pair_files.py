"""Images with captions in files: a folder of both, or tar shards of them (WebDataset's layout).

`<data_dir>/<split>/` holds `a.jpg` and `a.txt`, `b.png` and `b.txt`, ..., or `*.tar` with such members. Files
belong together that have the same name up to the first dot. Each line of a caption file is a caption. Shards
are not unpacked: their members are found once, and read where they lie.
"""

import functools
import io
import logging
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from scaling.data.sources import Columns
from scaling.errors import UserError

if TYPE_CHECKING:
    from scaling.data.options import Data

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

log = logging.getLogger(__name__)


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


SKIP = "give data.unreadable='skip'"


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
    root = Path(str(data.data_dir))
    if not (root / split).is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise UserError(f"split {split!r}: {root} has {', '.join(there) or 'no folders'}; give one per split")
    return _open(root, split, data.unreadable == "skip", data.threads)


@functools.lru_cache(maxsize=4)
def _open(root: Path, split: str, skip: bool, threads: int) -> FilePairs:
    found: dict[str, dict[str, Part]] = defaultdict(dict)
    for key, kind, part in _parts(root / split):
        if kind in found[key]:
            raise UserError(f"{part}: has the name of {found[key][kind]}; give each pair its own")
        found[key][kind] = part
    if not found:
        raise UserError(f"data_dir={str(root)!r}: {split} has no pairs, such as a.jpg and a.txt, or shards")
    faults = {}
    for key, parts in found.items():
        if len(parts) < 2:
            (part,) = parts.values()
            faults[key] = f"{part}: has no {'caption' if 'image' in parts else 'image'} beside it"
    if faults and not skip:
        raise UserError(f"{next(iter(faults.values()))}; give both, or {SKIP}")
    keys = [key for key in sorted(found) if key not in faults]
    if skip:
        with ThreadPoolExecutor(threads) as pool:
            checked = pool.map(lambda key: _fault(found[key]["image"], found[key]["text"]), keys)
            faults |= {key: fault for key, fault in zip(keys, checked, strict=True) if fault}
        keys = [key for key in keys if key not in faults]
        _say(root / split, list(faults.values()), len(found))
    images, texts = (tuple(found[key][kind] for key in keys) for kind in ("image", "text"))
    if not images:
        raise UserError(f"data_dir={str(root)!r}: of {len(found)} pairs of {split} none can be read")
    return FilePairs(root.name, images, texts)


def _fault(image: Part, text: Part) -> str:
    try:
        decoded(image), lines(text)
    except UserError as e:
        return str(e).split("; ")[0]
    return ""


def _say(folder: Path, faults: list[str], count: int) -> None:
    if faults:
        log.warning("%s: %d of %d pairs are skipped: %s", folder, len(faults), count, "; ".join(faults))


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
