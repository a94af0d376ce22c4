"""What is in a run's folder, to compare it with what was there."""

from pathlib import Path
from typing import Any

from scaling.files import read_json


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run folder but its lock."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def status(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "status.json")
    assert found is not None
    return found


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()
