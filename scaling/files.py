"""Files that are complete or absent: atomic writes, JSON, and locks."""

import contextlib
import fcntl
import glob
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from scaling.errors import UserError


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes a temporary neighbour, then renames it: readers see the old file or the new one.

    Raises:
        UserError: if the file cannot be written (a full disk, a folder without permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _remove_abandoned(path)
        with temporary.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # as long as it is written
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({e.strerror}); free space or choose another folder"
        ) from e


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary neighbours of processes that were killed while they wrote the file.

    One that was changed a moment ago may be of a process that is about to lock it.
    """
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with contextlib.suppress(OSError):
            if time.time() - temporary.stat().st_mtime > 1.0:
                with open_locked(temporary):
                    temporary.unlink()


def open_locked(path: Path) -> IO[str]:
    """Opens a file under a lock that one process holds at a time, until it closes the file or ends.

    Raises:
        BlockingIOError: if another process holds it.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BlockingIOError from None
    return file


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, advice: str = "delete it or choose another folder") -> Any:
    """Returns the file's value, or None if there is no such file.

    Raises:
        UserError: if the file is not JSON; its message ends with `advice`.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(f"{path}: is not JSON ({e}); {advice}") from None
