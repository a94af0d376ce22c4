"""Evaluation and sampling of a run that is already trained."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling import evaluators
from scaling.errors import UserError
from scaling.evaluators.base import (
    CheckInterrupt,
    Context,
    Evaluator,
    Measure,
    Pictures,
    never_interrupted,
    prepare,
)
from scaling.evaluators.generate import make_generator, sampler_of
from scaling.evaluators.image_grid import write_grid
from scaling.files import write_atomic
from scaling.models.conditioning import Condition
from scaling.objectives.diffusion import Diffusion
from scaling.parallel import sharding
from scaling.parallel.mesh import Mesh
from scaling.progress import track
from scaling.run import build, restore
from scaling.run.helpers import RunHelpers
from scaling.run.options import Config
from scaling.sampling import Sampling
from scaling.training import config
from scaling.validation import parse_dataclass


def on_one_device(cfg: Config) -> build.Run:
    """Builds a run on one device, to be checked and not trained."""
    return build.build(dataclasses.replace(cfg, mesh=Mesh()), jax.devices()[:1])


def check_all(run: build.Run) -> dict[str, Evaluator]:
    """Makes the evaluators of a run's config and checks them, before anything that they need is trained.

    The sampling section of a run that generates is checked too.

    Raises:
        UserError: if one cannot measure the run.
    """
    if isinstance(run.objective, Diffusion):
        sampler_of(run.config.sampling, run.objective, run)
    made = evaluators.make(run.config.evaluators)
    for name, evaluator in made.items():
        needed = {folder: _needed(source, folder) for source, folder in evaluator.needs()}
        evaluator.check(name, run, needed)
    return made


def metric_names(cfg: Config) -> tuple[str, ...]:
    """Returns the names of the metrics that a run's evaluators measure, once they have checked the run.

    Raises:
        UserError: if one cannot measure the run.
    """
    run = on_one_device(cfg)
    return tuple(
        metric for name, evaluator in check_all(run).items() for metric in evaluator.metrics(name, run)
    )


def _needed(source: str, folder: str) -> build.Run:
    """Builds a run that an evaluator needs: that of the folder, or the one that would be trained there."""
    begun = (Path(folder) / "config.json").exists()
    return build.described_run(folder) if begun else build.build(config.load(source))


def prepare_all(
    made: Mapping[str, Evaluator],
    run: build.Run,
    folder: Path,
    helpers: RunHelpers,
    check_interrupt: CheckInterrupt = never_interrupted,
    pictures: Pictures | None = None,
) -> dict[str, Measure]:
    """Prepares evaluators, whose runs are trained by now; returns their measurements by their names.

    Raises:
        UserError: if a helper of the run is missing or has changed.
    """
    helpers.named()
    return {
        name: prepare(evaluator, Context(name, run, folder, helpers, check_interrupt, pictures))
        for name, evaluator in made.items()
    }


def evaluate(folder: Path, checkpoint: int | None = None) -> dict[str, float]:
    """Runs every evaluator of the run's config on a checkpoint, the newest undamaged one by default.

    It writes only grids. The values are the same on every process.
    """
    restored = restore.restore_run(folder, step=checkpoint)
    run = restored.run
    measures = prepare_all(check_all(run), run, folder, RunHelpers(run, folder))
    values: dict[str, float] = {}
    for measure in measures.values():
        values |= measure(restored.weights, restored.step)
    return values


def named_arrays(condition: Condition) -> dict[str, Any]:
    """Returns the arrays of a condition by their paths; a single array is called "labels"."""
    leaves = jax.tree_util.tree_leaves_with_path(condition)
    return {sharding.path_of(keys) or "labels": leaf for keys, leaf in leaves}


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
    generate = make_generator(run, sampling, batch_size, RunHelpers(run, folder).all())
    batches = generate(restored.weights, samples)
    count = -(-samples // batch_size)
    first = jax.process_index() == 0
    shown = track(batches, "sampling", count, examples=batch_size, show=first)
    on_host = [jax.tree.map(np.asarray, batch) for batch in shown]
    if not first:
        return
    images, condition = jax.tree.map(lambda *parts: np.concatenate(parts)[:samples], *on_host)
    write_grid(out, images)
    if npz is not None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images, **named_arrays(condition))
        write_atomic(npz, buffer.getvalue())
