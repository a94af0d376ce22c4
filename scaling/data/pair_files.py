"""Images with captions in files: a folder of both, or tar shards of them (WebDataset's layout).

`<data_dir>/<split>/` holds `a.jpg` and `a.txt`, `b.png` and `b.txt`, ..., or `*.tar` with such members. Files
belong together that have the same name up to the first dot. Each line of a caption file is a caption. Shards
are not unpacked: their members are found once, and read where they lie. For this they must not be compressed,
and a compressed one is an error.
"""

import functools
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from scaling.data.decoding import decode_image
from scaling.data.folders import SKIP, files, hidden, readable, say_unread, split_folder
from scaling.data.sources import Columns
from scaling.errors import UserError

if TYPE_CHECKING:
    from scaling.data.options import Data

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
SHARD, TEXT = ".tar", ".txt"
ARCHIVES = re.compile(
    r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|lz|z|br)|tgz|taz|tbz2?|txz|tzst|zip|7z|rar)$", re.IGNORECASE
)
READ = f"images are {', '.join(IMAGES)}, captions {TEXT}, shards {SHARD}"


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
    """Returns the image, uint8 [H, W, 3]; see `decode_image`.

    Raises: UserError, naming the file, for what is no image or not a whole one.
    """
    try:
        return decode_image(part.bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"{part}: is not a readable image ({e}); mend it, or {SKIP}") from None


def lines(part: Part) -> tuple[str, ...]:
    """Returns the captions.

    A line ends at a line feed or a carriage return and at no other character: `str.splitlines` would end it
    at U+2028 within a caption too, and at seven more. A byte order mark is no part of the first caption.

    Raises: UserError, naming the file, where it has no caption, or is not text.
    """
    try:
        text = part.bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{part}: cannot be read ({e.strerror or e}); mend it, or {SKIP}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{part}: is not text in UTF-8 ({e.reason}); mend it, or {SKIP}") from None
    if "\0" in text:  # as UTF-16 without a byte order mark has beside every letter
        raise UserError(f"{part}: is not text in UTF-8 (it holds zero bytes); mend it, or {SKIP}")
    found = tuple(line.strip() for line in re.split(r"[\r\n]", text) if line.strip())
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
    unread: list[str] = []  # names of other files
    for name, part in _parts(folder):
        key, kind = _one(name)
        if kind is None:
            unread.append(name)
        elif kind in found[key]:
            raise UserError(f"{part}: has the name of {found[key][kind]}; give each pair its own")
        else:
            found[key][kind] = part
    say_unread(folder, unread, READ)
    if not found:
        raise UserError(f"data_dir: {folder} has no pairs, such as a.jpg and a.txt, or shards")
    instead = _by_pair(unread) if any(len(parts) < 2 for parts in found.values()) else {}
    keys = sorted(found)
    if skip:
        keys = readable(keys, lambda key: _read(found[key], instead.get(key)), f"pairs of {folder}", threads)
    if not keys:
        raise UserError(f"data_dir: of {len(found)} pairs of {folder} none can be read")
    images, texts = zip(*(_both(found[key], instead.get(key)) for key in keys), strict=True)
    return FilePairs(folder.parent.name, images, texts)


def _by_pair(unread: list[str]) -> dict[str, str]:
    """Returns the files that are not read, by the name of the pair that they would belong to."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in unread:
        found[_one(name)[0]].append(name)
    return {key: ", ".join(names) for key, names in found.items()}


def _both(parts: Mapping[str, Part], instead: str | None) -> tuple[Part, Part]:
    """Returns a pair's image and its text.

    Raises: UserError for half a pair, with the names of the files that lie there `instead` of the other half.
    """
    if len(parts) < 2:
        (part,) = parts.values()
        other, suffixes = ("caption", TEXT) if "image" in parts else ("image", ", ".join(IMAGES))
        why = f" ({instead}: not read, since its name would have to end in {suffixes})" if instead else ""
        raise UserError(f"{part}: has no {other} beside it{why}; give both, or {SKIP}")
    return parts["image"], parts["text"]


def _read(parts: Mapping[str, Part], instead: str | None) -> None:
    image, text = _both(parts, instead)
    decoded(image), lines(text)


def _parts(folder: Path) -> Iterator[tuple[str, Part]]:
    """Yields the name and the place of each file and of each member of a shard, but of hidden ones.

    Raises: UserError for an archive that is not read.
    """
    for path in files(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() == SHARD and not hidden(name):
            found = [(f"{path.name}/{part.member}", part) for part in _members(path)]
        else:
            found = [(name, Part(path))]
        for name, part in found:
            if hidden(name):
                continue
            if ARCHIVES.search(name):
                raise UserError(
                    f"{part}: is an archive that is not read, since its files cannot be read one by one; "
                    f"unpack it to a plain {SHARD} or to files, or move it away"
                )
            yield name, part


def _one(name: str) -> tuple[str, str | None]:
    """Returns the name of a file's pair, and its kind: "image", "text", or None for one that is not read."""
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    kind = "image" if suffix in IMAGES else "text" if suffix == TEXT else None
    return str(path.with_name(path.name.split(".")[0])), kind


def _members(path: Path) -> list[Part]:
    """Returns where the files of a shard lie.

    Raises: UserError for a shard that is not whole, or has links.
    """
    size, found = path.stat().st_size, []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.islnk() or member.issym():
                    raise UserError(
                        f"{path}:{member.name}: is a link to {member.linkname}, which shards cannot have; "
                        "pack it again with --dereference --hard-dereference"
                    )
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                found.append(Part(path, member.offset_data, member.size, member.name))
            if Part(path, shard.offset, tarfile.BLOCKSIZE).bytes() != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it does not end as a tar file does")
    except (tarfile.TarError, EOFError, OSError) as e:
        raise UserError(f"{path}: is not a whole tar file ({e}); copy it again") from None
    return found
