"""Helpers for sources of users' files: the folder of a split, and reports of files that are left out."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from scaling.errors import UserError, one_line

T = TypeVar("T")

SKIP = "give data.unreadable='skip'"
log = logging.getLogger(__name__)


def split_folder(root: Path, split: str, holds: str) -> Path:
    """Returns the folder `root/split`; `holds` says what is expected in it, for the error.

    Raises:
        UserError: if there is no such folder; the message lists the folders that exist.
    """
    if not (root / split).is_dir():
        names = folders(root) if root.is_dir() else []
        raise UserError(
            f"split {split!r}: data.data_dir={str(root)!r} has {', '.join(names) or 'no folders'}; "
            f"{holds} are looked for in {root / split}"
        )
    return root / split


def folders(root: Path) -> list[str]:
    """Returns the names of the folders in `root`, sorted."""
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def files(folder: Path, within: tuple[Path, ...] = ()) -> list[Path]:
    """Returns all files below a folder, sorted by name; links to other folders are followed.

    `within` holds the folders above this one in the recursion, with links resolved.

    Raises:
        UserError: if a folder cannot be listed, or is a link to a folder that it lies in.
    """
    real = folder.resolve()
    if real in within:
        raise UserError(f"{folder}: is a link to a folder that it lies in, {real}; remove the link")
    paths: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            contents = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as e:
        raise UserError(f"{folder}: cannot be listed ({e.strerror}); mend its permissions") from None
    for name, is_folder in contents:
        paths += files(folder / name, (*within, real)) if is_folder else [folder / name]
    return paths


def say_unread(folder: Path, unread: Iterable[str], read: str) -> None:
    """Logs how many files of a folder are left out, by the suffixes of their names.

    `unread` has their names, and `read` describes the files that are read. Hidden files are not data, and
    are not counted.
    """
    suffixes = [Path(name).suffix.lower() or Path(name).name for name in unread if not hidden(name)]
    if suffixes:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in Counter(suffixes).most_common(10))
        log.warning("%s: %d files in it are not read (%s): %s", folder, len(suffixes), one_line(counts), read)


def hidden(name: str) -> bool:
    """Returns whether a path's last part begins with a dot, as macOS's .DS_Store and ._photo.jpg do."""
    return name.rpartition("/")[2].startswith(".")


def readable(items: Sequence[T], read: Callable[[T], Any], what: str, threads: int) -> list[T]:
    """Returns the items that `read` accepts; the log names those for which it fails with a UserError."""

    def fault(item: T) -> str | None:
        try:
            read(item)
        except UserError as e:
            return str(e).partition("; ")[0]
        return None

    with ThreadPoolExecutor(threads) as pool:
        faults = list(pool.map(fault, items))
    reasons = [reason for reason in faults if reason is not None]
    if reasons:
        log.warning("%d of %d %s are skipped: %s", len(reasons), len(items), what, "; ".join(reasons))
    return [item for item, reason in zip(items, faults, strict=True) if reason is None]
