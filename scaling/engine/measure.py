"""A trained run, measured or sampled after the fact."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from scaling.engine import evaluate as evaluators
from scaling.engine import features, sharding
from scaling.engine.evaluator import measured
from scaling.engine.images import write_grid
from scaling.errors import UserError
from scaling.files import write_atomic
from scaling.sampling import Sampling
from scaling.typed import typed


def evaluate(folder: Path) -> dict[str, float]:
    """Every evaluator of the run's config, on its newest whole checkpoint; nothing is written but grids.

    The values are the same on every process.
    """
    trained = features.restore(folder)
    values: dict[str, float] = {}
    for name, evaluator in trained.built.config.evaluate.items():
        evaluator.check(name, trained.built)
        values |= measured(
            name, evaluator, trained.built, trained.weights, folder, trained.step, lambda: None
        )
    return values


def sample(
    folder: Path, out: Path, npz: Path | None, samples: int, batch_size: int, options: Mapping[str, Any]
) -> None:
    """Writes a grid of images, and with `npz` the arrays `images` uint8 [N, H, W, C] and `labels` int32 [N].

    `options` override fields of the config's sampling section. Of several processes the first writes.
    """
    if samples < 1:
        raise UserError(f"samples={samples}: must be at least 1")
    trained = features.restore(folder)
    built = trained.built
    sharding.batch_sharding(built.mesh, batch_size, "batch-size")
    given = {**dataclasses.asdict(built.config.sampling), **options}
    chosen: Sampling = typed(Sampling, given, "sampling")
    batches = evaluators.generate(built, trained.weights, chosen, samples, batch_size)
    count = -(-samples // batch_size)
    first = jax.process_index() == 0
    quiet = None if first else True  # None: where there is no terminal
    made = [np.asarray(b) for b in tqdm(batches, total=count, unit="batch", desc="sampling", disable=quiet)]
    if not first:
        return
    images = np.concatenate(made)[:samples]
    write_grid(out, images)
    if npz is not None:
        buffer = io.BytesIO()
        labels = np.arange(samples, dtype=np.int32) % built.info.num_classes
        np.savez_compressed(buffer, images=images, labels=labels)
        write_atomic(npz, buffer.getvalue())
