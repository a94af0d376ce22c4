"""Helpers for the readers of users' files: the folder of a split, and files that are not read."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from scaling.errors import UserError

T = TypeVar("T")

SKIP = "give data.unreadable='skip'"
log = logging.getLogger(__name__)


def split_folder(root: Path, split: str, holds: str) -> Path:
    """`root/split`. Raises UserError where it is not, with the folders there are and what it `holds`."""
    if not (root / split).is_dir():
        there = folders(root) if root.is_dir() else []
        raise UserError(
            f"split {split!r}: data_dir={str(root)!r} has {', '.join(there) or 'no folders'}; "
            f"{holds} are looked for in {root / split}"
        )
    return root / split


def folders(root: Path) -> list[str]:
    """The names of those in it, in order."""
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def files(folder: Path, within: tuple[Path, ...] = ()) -> list[Path]:
    """Returns all files below a folder, in order of their names; links to other folders are followed.

    `within` has the folders that led here, with links resolved.

    Raises: UserError for a folder that cannot be listed, or is a link to one that it lies in.
    """
    real = folder.resolve()
    if real in within:
        raise UserError(f"{folder}: is a link to a folder that it lies in, {real}; remove the link")
    found: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            there = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as e:
        raise UserError(f"{folder}: cannot be listed ({e.strerror}); mend its permissions") from None
    for name, is_folder in there:
        found += files(folder / name, (*within, real)) if is_folder else [folder / name]
    return found


def say_unread(folder: Path, unread: Iterable[str], read: str) -> None:
    """Logs how many of the files of a folder are left out, by the suffixes of their names.

    `unread` has the names, and `read` says what is read. Hidden files are no data, and are not counted.
    """
    suffixes = [Path(name).suffix.lower() or Path(name).name for name in unread if not hidden(name)]
    if suffixes:
        said = ", ".join(f"{count} {suffix}" for suffix, count in Counter(suffixes).most_common(10))
        log.warning("%s: %d files in it are not read (%s): %s", folder, len(suffixes), said, read)


def hidden(name: str) -> bool:
    """Returns whether a path's last part begins with a dot, as .DS_Store and ._photo.jpg of macOS do."""
    return name.rpartition("/")[2].startswith(".")


def readable(found: Sequence[T], read: Callable[[T], Any], what: str, threads: int) -> list[T]:
    """Those that `read` does not raise UserError for; the log counts and names the others."""

    def fault(one: T) -> str | None:
        try:
            read(one)
        except UserError as e:
            return str(e).partition("; ")[0]
        return None

    with ThreadPoolExecutor(threads) as pool:
        faults = list(pool.map(fault, found))
    bad = [why for why in faults if why is not None]
    if bad:
        log.warning("%d of %d %s are skipped: %s", len(bad), len(found), what, "; ".join(bad))
    return [one for one, why in zip(found, faults, strict=True) if why is None]
