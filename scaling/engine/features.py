"""Finished runs as tools: a classifier that the package trained, as the feature space of a distance."""

import dataclasses
import hashlib
import io
import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from scaling import data
from scaling.engine import build, changes, config, sharding, state, tracing
from scaling.engine.checkpoint import Checkpoints
from scaling.engine.runfolder import steps_in
from scaling.errors import UserError
from scaling.files import read_json, write_atomic
from scaling.metrics import frechet
from scaling.objectives.base import Extras
from scaling.typed import typed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A run read back: what it was built from, and the weights to evaluate with."""

    built: build.Built
    weights: dict[str, Any]  # {"params", "collections"}
    step: int


def restore(folder: Path | str) -> Trained:
    """The newest whole checkpoint of a run folder, on whatever devices there are; raises UserError if there
    is none.
    """
    described = read_json(Path(folder) / "config.json")
    if described is None:
        raise UserError(
            f"run={folder}: no config.json there; give the folder of a run made by `scaling train`"
        )
    cfg = config.from_dict(changes.stored(described))
    cfg = dataclasses.replace(cfg, mesh=cfg.mesh.elsewhere(jax.device_count()))
    built = build.build(cfg, info=_info(described))
    with Checkpoints(Path(folder) / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(state.abstract(built))
    if restored is None:
        raise UserError(f"run={folder}: has no checkpoint yet; train it first")
    return Trained(built, state.inference(restored[0]), restored[1])


def _info(described: Mapping[str, Any]) -> data.Info | None:
    """What a run's config.json says of its data: None where an older one does not."""
    known = described.get("data")
    return known and typed(data.Info, known, "data")


@dataclass(frozen=True)
class Real:
    """Gaussian statistics of real images' features, and the distance between two halves of them."""

    mean: np.ndarray  # [D]
    cov: np.ndarray  # [D, D]
    floor: float


class Features:
    """The pooled features of a classifier, and what real data looks like through them."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.trained = restore(folder)
        built = self.trained.built
        if not hasattr(built.task, "features") or not hasattr(built.model, "features"):
            raise UserError(
                f"classifier={folder}: is a run of {built.config.objective.name} with "
                f"{built.config.model.name}, which has no features; give that of a classifier"
            )
        self._apply = tracing.whole(built.mesh, self._forward)
        self._gather = tracing.whole(built.mesh, lambda x: x)
        self._of = weights_digest(on_host({k: self.trained.weights[k] for k in ("params", "collections")}))
        self.dim = int(jax.eval_shape(self._forward, built.batch(1)["image"]).shape[1])

    def _forward(self, images: jax.Array) -> jax.Array:
        weights, task = self.trained.weights, self.trained.built.task
        extras = Extras(collections=weights["collections"])
        return task.features(weights["params"], extras, {"image": images})  # type: ignore[attr-defined]

    def __call__(self, images: jax.Array) -> np.ndarray:
        """uint8 [N, H, W, C] -> float64 [N, D], the same on every process."""
        return np.asarray(self._apply(images), np.float64)

    def real(self, split: str, images: data.Data | None = None) -> Real:
        """Returns statistics of every example of a split; measured once and kept in the classifier's folder.

        `images` says of which set and how cropped, where that is not the classifier's own. The file says of
        which weights and images it is (`data.fingerprint`); it is measured again where these are others now.
        """
        own = self.trained.built.config.data
        images = images or own
        other = "" if _seen(images) == _seen(own) else f"_{zlib.crc32(repr(_seen(images)).encode()):08x}"
        path = self.folder / f"features_{split}{other}.npz"
        seen = f"{split} {_seen(images)} {data.fingerprint(images, split)}"
        of = f"{self._of} {seen} {self.trained.built.config.preprocessing}"
        return _kept(path, of) or self._measured(path, of, split, images)

    def _measured(self, path: Path, of: str, split: str, images: data.Data) -> Real:
        whole, *halves = (frechet.GaussianStatistics(self.dim) for _ in range(3))
        coin = np.random.default_rng(0)  # splits may be in order of class, or take the classes in turn
        for rows in self._split(split, images):
            first = coin.random(len(rows)) < 0.5
            for statistics, chosen in ((whole, rows), (halves[0], rows[first]), (halves[1], rows[~first])):
                statistics.update(chosen)
        floor = frechet.frechet_distance(*(x for h in halves for x in (h.mean, h.covariance)))
        real = Real(whole.mean, whole.covariance, floor)
        if jax.process_index() == 0:
            buffer = io.BytesIO()
            np.savez(buffer, mean=real.mean, cov=real.cov, floor=real.floor, of=of)
            write_atomic(path, buffer.getvalue())
        return real

    def _split(self, split: str, images: data.Data) -> Iterator[np.ndarray]:
        built = self.trained.built
        size = 256 * built.mesh.size
        place = sharding.batch_sharding(built.mesh, size, "batch_size")
        for batch in data.eval_batches(images, split, size, place):
            yield self(batch["image"])[np.asarray(self._gather(batch["mask"])) > 0]


def _kept(path: Path, of: str) -> Real | None:
    """Returns the statistics of a file that is of the right weights and images; None where there is none."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if str(file["of"]) == of:
                return Real(file["mean"], file["cov"], float(file["floor"]))
            why = "is of other weights or images"
    except FileNotFoundError:
        return None
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        why = f"does not say what it is of, or is damaged ({type(e).__name__})"
    if jax.process_index() == 0:
        log.warning("%s: %s; it is measured again", path, why)
    return None


def _seen(images: data.Data) -> dict[str, Any]:
    """Returns what decides which images evaluation sees."""
    beside = ("augment", "train_split", "text", "batch_size", "threads", "workers", "prefetch")
    return {key: value for key, value in dataclasses.asdict(images).items() if key not in beside}


def on_host(weights: Any) -> Any:
    """Returns a tree of arrays whole, wherever they lie; the same on every process."""
    return multihost_utils.process_allgather(weights, tiled=True)


def weights_digest(whole: Mapping[str, Any]) -> str:
    """Returns a digest of a tree of arrays that are on this host."""
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(whole, sep="/").items()):
        digest.update(f"{name} {array.shape}".encode() + np.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def load(folder: str) -> Features:
    """Returns a trained classifier; the same serves every evaluation of a process, until it is trained on."""
    steps = steps_in(Path(folder) / "checkpoints")
    return _loaded(str(Path(folder).resolve()), steps[-1] if steps else -1)


@cache
def _loaded(folder: str, step: int) -> Features:
    return Features(folder)
