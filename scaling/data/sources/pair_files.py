"""Images with captions in files: a folder of both, or tar shards of them (WebDataset's layout).

`<data_dir>/<split>/` holds `a.jpg` and `a.txt`, `b.png` and `b.txt`, ..., or `*.tar` with such members. Two
files are a pair if they have the same name up to the first dot. Each line of a caption file is a caption.
Shards are not unpacked: their members are located once, and read in place. For this they must not be
compressed; a compressed one is an error.
"""

import functools
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from scaling.data.decoding import decode_image
from scaling.data.folders import SKIP, files, hidden, readable, say_unread, split_folder
from scaling.data.sources.base import Columns
from scaling.errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
SHARD, TEXT = ".tar", ".txt"
ARCHIVES = re.compile(
    r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|lz|z|br)|tgz|taz|tbz2?|txz|tzst|zip|7z|rar)$", re.IGNORECASE
)
READ = f"images are {', '.join(IMAGES)}, captions {TEXT}, shards {SHARD}"


@dataclass(frozen=True)
class Part:
    """A file, or a member of a shard, as a range of bytes."""

    path: Path  # the file or the shard
    start: int = 0  # offset of the first byte
    size: int = -1  # number of bytes; -1: to the end
    member: str = ""  # name within the shard; "" for a file

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def bytes(self) -> bytes:
        """Reads the content."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True)
class FilePairs:
    """A split of pairs; images are decoded when they are read."""

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

    Raises:
        UserError: if it is not an image, or not a complete one; the message names the file.
    """
    try:
        return decode_image(part.bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"{part}: is not a readable image ({e}); mend it, or {SKIP}") from None


def lines(part: Part) -> tuple[str, ...]:
    """Returns the captions.

    A line ends at a line feed or a carriage return only: `str.splitlines` would also split a caption at
    U+2028 and at seven other characters. A byte order mark is not part of the first caption.

    Raises:
        UserError: if the file has no caption, or is not text; the message names it.
    """
    try:
        text = part.bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{part}: cannot be read ({e.strerror or e}); mend it, or {SKIP}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{part}: is not text in UTF-8 ({e.reason}); mend it, or {SKIP}") from None
    if "\0" in text:  # UTF-16 without a byte order mark has one beside every letter
        raise UserError(f"{part}: is not text in UTF-8 (it holds zero bytes); mend it, or {SKIP}")
    captions = tuple(line.strip() for line in re.split(r"[\r\n]", text) if line.strip())
    if not captions:
        raise UserError(f"{part}: has no caption; give it one, or {SKIP}")
    return captions


def pair_files(root: Path, split: str, skip: bool, threads: int) -> FilePairs:
    """Returns a split of a folder. With `skip` every pair is read once, and the log lists those that fail.

    Raises:
        UserError: if the folder has no readable pairs; without `skip`, also if one cannot be read.
    """
    return _open_folder(split_folder(root, split, "pairs and shards"), skip, threads)


@functools.lru_cache(maxsize=4)
def _open_folder(folder: Path, skip: bool, threads: int) -> FilePairs:
    pairs: dict[str, dict[str, Part]] = defaultdict(dict)  # name of the pair -> kind -> part
    unread: list[str] = []  # names of other files
    for name, part in _list_parts(folder):
        key, kind = _pair_and_kind(name)
        if kind is None:
            unread.append(name)
        elif kind in pairs[key]:
            raise UserError(f"{part}: has the name of {pairs[key][kind]}; give each pair its own")
        else:
            pairs[key][kind] = part
    say_unread(folder, unread, READ)
    if not pairs:
        raise UserError(f"data.data_dir: {folder} has no pairs, such as a.jpg and a.txt, or shards")
    unread_of = _unread_by_pair(unread) if any(len(parts) < 2 for parts in pairs.values()) else {}
    keys = sorted(pairs)
    if skip:
        keys = readable(
            keys, lambda key: _check_pair(pairs[key], unread_of.get(key)), f"pairs of {folder}", threads
        )
    if not keys:
        raise UserError(f"data.data_dir: of {len(pairs)} pairs of {folder} none can be read")
    images, texts = zip(*(_image_and_text(pairs[key], unread_of.get(key)) for key in keys), strict=True)
    return FilePairs(folder.parent.name, images, texts)


def _unread_by_pair(unread: list[str]) -> dict[str, str]:
    """Returns the files that are not read, by the name of the pair that they would belong to."""
    names_of: dict[str, list[str]] = defaultdict(list)
    for name in unread:
        names_of[_pair_and_kind(name)[0]].append(name)
    return {key: ", ".join(names) for key, names in names_of.items()}


def _image_and_text(parts: Mapping[str, Part], unread: str | None) -> tuple[Part, Part]:
    """Returns a pair's image and its text; `unread` names files of that pair's name that are not read.

    Raises:
        UserError: if one of the two is missing; the message names the `unread` files.
    """
    if len(parts) < 2:
        (part,) = parts.values()
        other, suffixes = ("caption", TEXT) if "image" in parts else ("image", ", ".join(IMAGES))
        why = f" ({unread}: not read, since its name would have to end in {suffixes})" if unread else ""
        raise UserError(f"{part}: has no {other} beside it{why}; give both, or {SKIP}")
    return parts["image"], parts["text"]


def _check_pair(parts: Mapping[str, Part], unread: str | None) -> None:
    """Reads a pair, to find out whether that is possible."""
    image, text = _image_and_text(parts, unread)
    decoded(image), lines(text)


def _list_parts(folder: Path) -> Iterator[tuple[str, Part]]:
    """Yields the name and the place of each file and of each member of a shard, except hidden ones.

    Raises:
        UserError: if there is an archive that cannot be read.
    """
    for path in files(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() == SHARD and not hidden(name):
            parts = [(f"{path.name}/{part.member}", part) for part in _shard_members(path)]
        else:
            parts = [(name, Part(path))]
        for name, part in parts:
            if hidden(name):
                continue
            if ARCHIVES.search(name):
                raise UserError(
                    f"{part}: is an archive that is not read, since its files cannot be read one by one; "
                    f"unpack it to a plain {SHARD} or to files, or move it away"
                )
            yield name, part


def _pair_and_kind(name: str) -> tuple[str, str | None]:
    """Returns the name of a file's pair, and the file's kind: "image", "text", or None if it is not read."""
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    kind = "image" if suffix in IMAGES else "text" if suffix == TEXT else None
    return str(path.with_name(path.name.split(".")[0])), kind


def _shard_members(path: Path) -> list[Part]:
    """Returns the places of the files in a shard.

    Raises:
        UserError: if the shard is incomplete, or has links or sparse files.
    """
    members = []
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.islnk() or member.issym():
                    raise UserError(
                        f"{path}:{member.name}: is a link to {member.linkname}, which shards cannot have; "
                        "pack it again with --dereference --hard-dereference"
                    )
                if member.issparse():
                    raise UserError(
                        f"{path}:{member.name}: is stored without its zeros, which shards cannot have; pack "
                        "it again without --sparse"
                    )
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                name = member.name.rstrip("/")  # of files some end so
                members.append(Part(path, member.offset_data, member.size, name))
            _require_end(path, shard.offset)
    except UserError:
        raise
    except Exception as e:  # tarfile fails in many ways
        raise UserError(f"{path}: is not a whole tar file ({e}); copy it again") from None
    return members


def _require_end(path: Path, offset: int) -> None:
    """Checks that a shard ends at `offset`: zeros follow, a block at least, and nothing else.

    To tarfile a hole in a copy is the end, too, and so is that of the first of two archives in one file.

    Raises:
        ReadError: if it does not end there.
    """
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it does not end as a tar file does")
        while rest := file.read(2**20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("it goes on after its end")
