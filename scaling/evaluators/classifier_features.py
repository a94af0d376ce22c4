"""The features of a classifier that the package trained, in which distances are measured."""

import dataclasses
import io
import logging
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling import data
from scaling.errors import UserError
from scaling.files import write_atomic
from scaling.metrics import frechet
from scaling.objectives.base import Extras
from scaling.parallel import sharding, tracing
from scaling.run.folder import steps_in
from scaling.run.restore import on_host, restore_run, weights_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceStats:
    """Gaussian statistics of the features of real images."""

    mean: np.ndarray  # [D]
    cov: np.ndarray  # [D, D]
    floor: float  # Fréchet distance between two random halves of the images


class ClassifierFeatures:
    """The pooled features of a classifier, and their statistics on real data."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.restored = restore_run(folder)
        run = self.restored.run
        if not hasattr(run.objective, "features") or not hasattr(run.model, "features"):
            raise UserError(
                f"classifier={folder}: is a run of {run.config.objective.name} with "
                f"{run.config.model.name}, which has no features; give that of a classifier"
            )
        self._apply = tracing.jit_replicated(run.mesh, self._forward)
        self._gather = tracing.jit_replicated(run.mesh, lambda x: x)
        weights = {k: self.restored.weights[k] for k in ("params", "collections")}
        self._digest = weights_digest(on_host(weights))
        self.dim = int(jax.eval_shape(self._forward, run.batch(1)["image"]).shape[1])

    def _forward(self, images: jax.Array) -> jax.Array:
        weights, objective = self.restored.weights, self.restored.run.objective
        extras = Extras(collections=weights["collections"])
        return objective.features(weights["params"], extras, {"image": images})  # type: ignore[attr-defined]

    def __call__(self, images: jax.Array) -> np.ndarray:
        """Computes the features float64 [N, D] of images uint8 [N, H, W, C], the same on every process."""
        return np.asarray(self._apply(images), np.float64)

    def real(self, split: str, images: data.Data | None = None) -> ReferenceStats:
        """Returns the statistics of every example of a split, from the classifier's folder if they are there.

        `images` are the data if they differ from the classifier's own, or are cropped otherwise. The file
        records the weights and images that it is of (`data.fingerprint`); statistics of others are measured
        again.
        """
        own = self.restored.run.config.data
        images = images or own
        view, own_view = _view_options(images), _view_options(own)
        suffix = "" if view == own_view else f"_{zlib.crc32(repr(view).encode()):08x}"
        path = self.folder / f"features_{split}{suffix}.npz"
        examples = f"{split} {view} {data.fingerprint(images, split)}"
        identity = f"{self._digest} {examples} {self.restored.run.config.preprocessing}"
        return _read_stats(path, identity) or self._measure(path, identity, split, images)

    def _measure(self, path: Path, identity: str, split: str, images: data.Data) -> ReferenceStats:
        """Measures the statistics of a split and writes them to the file."""
        total, *halves = (frechet.GaussianStatistics(self.dim) for _ in range(3))
        coin = np.random.default_rng(0)  # halves are random: the order of a split may depend on the class
        for rows in self._features_of(split, images):
            heads = coin.random(len(rows)) < 0.5
            for statistics, part in ((total, rows), (halves[0], rows[heads]), (halves[1], rows[~heads])):
                statistics.update(part)
        floor = frechet.frechet_distance(*(x for h in halves for x in (h.mean, h.covariance)))
        stats = ReferenceStats(total.mean, total.covariance, floor)
        if jax.process_index() == 0:
            buffer = io.BytesIO()
            np.savez(buffer, mean=stats.mean, cov=stats.cov, floor=stats.floor, of=identity)
            write_atomic(path, buffer.getvalue())
        return stats

    def _features_of(self, split: str, images: data.Data) -> Iterator[np.ndarray]:
        """Yields the features of every example of a split once, batch by batch."""
        run = self.restored.run
        size = 256 * run.mesh.size
        batch_sharding = sharding.batch_sharding(run.mesh, size, "batch_size")
        for batch in data.eval_batches(images, split, size, batch_sharding):
            yield self(batch["image"])[np.asarray(self._gather(batch["mask"])) > 0]


def _read_stats(path: Path, identity: str) -> ReferenceStats | None:
    """Reads the statistics in a file; None if it does not exist, is damaged, or has another identity."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if str(file["of"]) == identity:
                return ReferenceStats(file["mean"], file["cov"], float(file["floor"]))
            reason = "is of other weights or images"
    except FileNotFoundError:
        return None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        reason = f"does not say what it is of, or is damaged ({type(e).__name__})"
    if jax.process_index() == 0:
        log.warning("%s: %s; it is measured again", path, reason)
    return None


def _view_options(images: data.Data) -> dict[str, Any]:
    """Returns the options that decide which images evaluation sees."""
    others = ("train_transforms", "train_split", "text", "batch_size", "threads", "workers", "prefetch")
    return {key: value for key, value in dataclasses.asdict(images).items() if key not in others}


def load(folder: str) -> ClassifierFeatures:
    """Returns a trained classifier, cached in the process until a newer checkpoint of it appears."""
    steps = steps_in(Path(folder) / "checkpoints")
    return _load_step(str(Path(folder).resolve()), steps[-1] if steps else -1)


@cache
def _load_step(folder: str, step: int) -> ClassifierFeatures:
    return ClassifierFeatures(folder)
