"""Files that are complete or absent: atomic writes, JSON, and locks."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from scaling.errors import UserError

LOCK = "lock"  # name of a folder's file that is locked
CHECKSUM = "crc32"  # key of a JSON object's checksum


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


def write_all(file: IO[bytes], data: bytes) -> None:
    """Writes to an unbuffered file, which keeps nothing back that could fail once more when it is closed."""
    while data:
        data = data[file.write(data) :]


def sha256(path: Path) -> str:
    """Returns the digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> Path:
    """Makes a folder, and those above it, unless it is there; returns it.

    Raises:
        UserError: if it cannot be made (a full disk, a folder without permission).
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be made ({e.strerror}); free space or give access to it") from None
    return path


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


def lock_folder(folder: Path, key: str, busy: str) -> IO[str]:
    """Makes a folder, and opens its file `lock` as `open_locked` does; `key` is what gave the folder.

    Raises:
        UserError: if another process holds the lock, which `busy` describes, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open_locked(folder / LOCK)
    except BlockingIOError:
        raise UserError(f"{key}={folder}: {busy}; wait for it or stop it") from None
    except OSError as e:
        raise UserError(f"{key}={folder}: cannot be written ({e.strerror}); choose another folder") from e


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; an object has its checksum in it."""
    if isinstance(value, dict):
        value = with_checksum(value)
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with the CRC-32 of its content."""
    return {**value, CHECKSUM: _checksum(json.loads(json.dumps(value)))}


def without_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the object that was written; one without a checksum is of an earlier version, or by hand.

    Raises:
        ValueError: if it is not what was written.
    """
    content = {key: part for key, part in value.items() if key != CHECKSUM}
    if CHECKSUM in value and value[CHECKSUM] != _checksum(content):
        raise ValueError(f"is not what was written; take {CHECKSUM!r} out if you changed it")
    return content


def _checksum(content: Any) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def read_json(path: Path, advice: str = "delete it or choose another folder") -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None if there is no such file.

    Raises:
        UserError: if the file cannot be read, is not JSON, or holds something else than an object; its
            message ends with `advice`.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); give access to it, or {advice}") from None
    except (ValueError, RecursionError) as e:  # text that is not UTF-8, no JSON, or brackets without end
        raise UserError(f"{path}: is not JSON ({e}); {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object but {type(value).__name__}; {advice}")
    try:
        return without_checksum(value)
    except ValueError as e:
        raise UserError(f"{path}: {e}; {advice}") from None
