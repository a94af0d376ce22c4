"""What readers of your own files share: the folder of a split, and files that cannot be read."""

import logging
from collections.abc import Callable, Sequence
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
