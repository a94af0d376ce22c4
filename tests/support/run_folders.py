"""What is in a run's folder, to compare it with what was there."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling.files import read_json
from scaling.run import build, state
from scaling.training.import_weights import create_run_from_weights


def write_run(run: build.Run, folder: Path) -> None:
    """A run's folder as an import leaves it, with random weights: to compile how they start takes seconds."""
    rng, shapes = np.random.default_rng(0), state.abstract(run).params
    weights = jax.tree.map(lambda s: np.float32(0.2 * rng.standard_normal(s.shape)), shapes)
    create_run_from_weights(run, {"params": weights}, folder, "a test")


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
