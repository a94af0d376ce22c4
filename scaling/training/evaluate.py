"""Evaluation and sampling of a run that is already trained."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from scaling import evaluators
from scaling.errors import UserError
from scaling.evaluators.base import measured
from scaling.evaluators.generate import generate
from scaling.evaluators.image_grid import write_grid
from scaling.files import write_atomic
from scaling.models.conditioning import named_arrays
from scaling.parallel import sharding
from scaling.run import restore
from scaling.sampling import Sampling
from scaling.validation import parse_dataclass


def evaluate(folder: Path) -> dict[str, float]:
    """Runs every evaluator of the run's config on its newest undamaged checkpoint; writes only grids.

    The values are the same on every process.
    """
    restored = restore.restore_run(folder)
    run = restored.run
    values: dict[str, float] = {}
    for name, evaluator in evaluators.make(run.config.evaluators).items():
        evaluator.check(name, run)
        values |= measured(name, evaluator, run, restored.weights, folder, restored.step, lambda: None)
    return values


def sample(
    folder: Path, out: Path, npz: Path | None, samples: int, batch_size: int, options: Mapping[str, Any]
) -> None:
    """Writes a grid of images, and with `npz` the arrays `images` uint8 [N, H, W, C] and `labels` int32 [N].

    Clips are [N, T, H, W, C]; other conditions than labels are written by the names of their arrays.

    `options` override fields of the config's sampling section. Of several processes the first writes.

    Raises:
        UserError: for options or a batch size that are not allowed, or a run that cannot generate.
    """
    if samples < 1:
        raise UserError(f"samples={samples}: must be at least 1")
    restored = restore.restore_run(folder)
    run = restored.run
    sharding.batch_sharding(run.mesh, batch_size, "batch-size")
    fields = {**dataclasses.asdict(run.config.sampling), **options}
    sampling: Sampling = parse_dataclass(Sampling, fields, "sampling")
    batches = generate(run, restored.weights, sampling, samples, batch_size)
    count = -(-samples // batch_size)
    first = jax.process_index() == 0
    quiet = None if first else True  # None disables the bar only where there is no terminal
    shown = tqdm(batches, total=count, unit="batch", desc="sampling", disable=quiet)
    on_host = [jax.tree.map(np.asarray, batch) for batch in shown]
    if not first:
        return
    images, condition = jax.tree.map(lambda *parts: np.concatenate(parts)[:samples], *on_host)
    write_grid(out, images)
    if npz is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images, **named_arrays(condition))
        write_atomic(npz, buffer.getvalue())
