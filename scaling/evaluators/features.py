"""Feature networks, in whose features distances between sets of images are measured, and real statistics."""

import dataclasses
import io
import logging
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from scaling import data
from scaling.data import fingerprints
from scaling.evaluators.base import CheckInterrupt, never_interrupted
from scaling.files import write_atomic
from scaling.metrics import frechet
from scaling.parallel import sharding, tracing
from scaling.progress import track

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """Outputs of a network for N images, on the host and the same on every process."""

    pooled: np.ndarray  # float64 [N, D]
    logits: np.ndarray | None = None  # float32 [N, K]; None if the network is no classifier
    maps: np.ndarray | None = None  # float32 [N, h, w, C], features before pooling; None if it has none


class FeatureNetwork(Protocol):
    """A network from images uint8 [N, H, W, C] to features [N, D], such as a classifier's run."""

    folder: Path  # where statistics of real images are kept
    identity: str  # digest of the weights and of how pixels are normalised
    mesh: jax.sharding.Mesh
    dim: int  # D
    images: data.Data | None  # the images that it was trained on, if it knows

    def __call__(self, images: jax.Array) -> Features: ...


@dataclass(frozen=True)
class ReferenceStats:
    """Gaussian statistics of the features of real images."""

    mean: np.ndarray  # [D]
    cov: np.ndarray  # [D, D]
    floor: float  # Fréchet distance between two random halves of the images


def reference_stats(
    network: FeatureNetwork,
    split: str,
    images: data.Data,
    check_interrupt: CheckInterrupt = never_interrupted,
) -> ReferenceStats:
    """Returns the statistics of every example of a split, from the network's folder if they are there.

    The file records the weights and images that it is of (`fingerprints.of_images`); statistics of others are
    measured again.
    """
    view = _view_options(images)
    own = network.images is not None and view == _view_options(network.images)
    suffix = "" if own else f"_{zlib.crc32(repr(view).encode()):08x}"
    path = network.folder / f"features_{split}{suffix}.npz"
    identity = f"{network.identity} {split} {view} {fingerprints.of_images(images, split)}"
    stats = _read_stats(path, identity)
    if stats is None:
        stats = _measure(network, _features_of(network, split, images, check_interrupt))
        if jax.process_index() == 0:
            buffer = io.BytesIO()
            np.savez(buffer, mean=stats.mean, cov=stats.cov, floor=stats.floor, of=identity)
            write_atomic(path, buffer.getvalue())
    return stats


def _measure(network: FeatureNetwork, batches: Iterator[np.ndarray]) -> ReferenceStats:
    total, *halves = (frechet.GaussianStatistics(network.dim) for _ in range(3))
    coin = np.random.default_rng(0)  # halves are random: the order of a split may depend on the class
    for rows in batches:
        heads = coin.random(len(rows)) < 0.5
        for statistics, part in ((total, rows), (halves[0], rows[heads]), (halves[1], rows[~heads])):
            statistics.update(part)
    floor = frechet.frechet_distance(*(x for h in halves for x in (h.mean, h.covariance)))
    return ReferenceStats(total.mean, total.covariance, floor)


def _features_of(
    network: FeatureNetwork, split: str, images: data.Data, check_interrupt: CheckInterrupt
) -> Iterator[np.ndarray]:
    """Yields the features of every example of a split once, batch by batch."""
    gather = tracing.jit_replicated(network.mesh, lambda x: x)
    size = 256 * network.mesh.size
    batch_sharding = sharding.batch_sharding(network.mesh, size, "batch_size")
    batches = data.eval_batches(images, split, size, batch_sharding)
    count = math.ceil(len(data.open_source(images, split)) / size)
    show = jax.process_index() == 0
    for batch in track(batches, f"features of {split}", count, examples=size, show=show):
        check_interrupt()
        yield network(batch["image"]).pooled[np.asarray(gather(batch["mask"])) > 0]


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
