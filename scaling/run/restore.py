"""A run restored from its folder: what it was built from, and its weights."""

import dataclasses
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

from scaling import data
from scaling.data.sources.latents import in_current_keys
from scaling.errors import UserError
from scaling.files import read_json
from scaling.run import build, state
from scaling.run import config as run_config
from scaling.run.checkpoint import Checkpoints
from scaling.validation import parse_dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestoredRun:
    """A run restored from its folder, with the weights to evaluate."""

    run: build.Run
    weights: dict[str, Any]  # {"params", "collections"}
    step: int


def restore_run(folder: Path | str) -> RestoredRun:
    """Restores the newest undamaged checkpoint of a run folder, on whatever devices there are.

    Raises:
        UserError: if the folder holds no run, or has no checkpoint that can be read.
    """
    description = read_json(Path(folder) / "config.json")
    if description is None:
        raise UserError(
            f"run={folder}: no config.json there; give the folder of a run made by `scaling train`"
        )
    cfg = run_config.from_dict(run_config.stored(description))
    cfg = dataclasses.replace(cfg, mesh=cfg.mesh.elsewhere(jax.device_count()))
    run = build.build(cfg, info=_info(description))
    with Checkpoints(Path(folder) / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(state.only_eval_weights(state.abstract(run)))
    if restored is None:
        raise UserError(f"run={folder}: has no checkpoint yet; train it first")
    return RestoredRun(run, state.eval_weights(restored[0]), restored[1])


def _info(description: Mapping[str, Any]) -> data.Info | None:
    """Returns the description of the data in a run's config.json; None where an older file has none."""
    section = description.get("data")
    if section and section.get("latents"):
        section = {**section, "latents": in_current_keys(section["latents"])}
    return section and parse_dataclass(data.Info, section, "data")


def on_host(weights: Any) -> Any:
    """Gathers a tree of arrays from all devices onto the host; the result is the same on every process."""
    return multihost_utils.process_allgather(weights, tiled=True)


def weights_digest(weights: Mapping[str, Any]) -> str:
    """Returns a digest of a tree of arrays on this host."""
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(weights, sep="/").items()):
        digest.update(f"{name} {array.shape}".encode() + np.asarray(array).tobytes())
    return digest.hexdigest()[:16]
