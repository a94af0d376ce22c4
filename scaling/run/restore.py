"""A run restored from its folder: what it was built from, and its weights."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from scaling.errors import UserError
from scaling.run import build, state
from scaling.run.checkpoint import Checkpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestoredRun:
    """A run restored from its folder, with the weights to evaluate."""

    run: build.Run
    weights: dict[str, Any]  # {"params", "collections"}
    step: int


def restore_run(
    folder: Path | str, mesh: jax.sharding.Mesh | None = None, step: int | None = None
) -> RestoredRun:
    """Restores the newest undamaged checkpoint of a run folder, or that of `step`.

    It is sharded over `mesh`, or over whatever devices there are.

    Raises:
        UserError: if the folder holds no run, or has no such checkpoint that can be read.
    """
    run = build.described_run(folder, mesh)
    with Checkpoints(Path(folder) / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(state.only_eval_weights(state.abstract(run)), step=step)
    if restored is None:
        raise UserError(f"run={folder}: has no checkpoint yet; train it first")
    return RestoredRun(run, state.eval_weights(restored[0]), restored[1])


def on_host(weights: Any) -> Any:
    """Gathers a tree of arrays from all devices onto the host; the result is the same on every process."""
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weights)):
        return weights
    return multihost_utils.process_allgather(weights, tiled=True)


def weights_digest(weights: Mapping[str, Any]) -> str:
    """Returns a digest of a tree of arrays, the same on every process; one array at a time is on the host."""
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(weights, sep="/").items()):
        digest.update(f"{name} {array.shape}".encode() + np.asarray(on_host(array)).tobytes())
    return digest.hexdigest()[:16]
