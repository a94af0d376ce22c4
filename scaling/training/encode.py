"""`scaling encode`: writes the images of a set as a folder of latents (`data.name='latents'`)."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from scaling import data, evaluators
from scaling.data.sources.latents import (
    MANIFEST,
    Encoding,
    Latents,
    LatentSource,
    ShardWriter,
    Split,
    in_current_keys,
    require_whole,
)
from scaling.errors import UserError
from scaling.evaluators import autoencoder
from scaling.evaluators.autoencoder import RestoredAutoencoder
from scaling.evaluators.base import require_images
from scaling.files import LOCK, lock_folder, read_json, write_json
from scaling.objectives.base import scaled
from scaling.overrides import flat
from scaling.parallel import sharding, tracing
from scaling.parallel.mesh import Mesh
from scaling.progress import Progress, track
from scaling.run.options import Config

BEGUN = "encoding.json"  # description of the folder, written before its first shard
# Keys of the description that may differ between two processes: they change no latent.
CHANGE_NO_LATENT = ("run", "data.batch_size", "data.threads", "data.workers", "data.prefetch")
Shard = tuple[str, int]  # split, number


def encode(run: Path, cfg: Config, out: Path, batch_size: int) -> Latents | None:
    """Writes the folder `out`: the posterior moments of the images of `cfg.data` by the autoencoder of `run`.

    It has the splits that the config trains and evaluates on. The same command resumes an interrupted one:
    complete shards are kept. Of several processes each writes its share, and the first one completes the
    folder and returns its description.

    Raises:
        UserError: for a run or data that do not fit, a folder that holds anything else, or a full disk.
    """
    vae = autoencoder.restore_autoencoder(run)
    shape = data.info(cfg.data).image_shape
    for split in _splits(cfg):
        require_images(cfg.data, split, shape, "split")
    sources = {split: data.open_source(cfg.data, split) for split in _splits(cfg)}
    encoding = _describe(run, vae, cfg, {split: len(source) for split, source in sources.items()})
    _require_same(out, encoding)
    mesh = sharding.make_mesh(Mesh(), jax.local_devices())  # each process encodes on its own devices
    sharding.batch_sharding(mesh, batch_size, "batch-size")
    _barrier("checked")  # a process that is still checking must not see a folder half made
    first = jax.process_index() == 0
    with lock_folder(out, "out", "another process is encoding there") if first else nullcontext():
        if first:
            _require_same(out, encoding)  # another may have begun since
            if not (out / BEGUN).exists():
                write_json(out / BEGUN, dataclasses.asdict(encoding))
        _barrier("begun")
        moments = _make_encoder(vae, encoding, mesh)
        _write(out, encoding, cfg.data, sources, batch_size, moments)
        _barrier("encoded")
        return _complete(out, encoding, vae, cfg.data.train_split) if first else None


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def share(encoding: Encoding, index: int, count: int) -> list[Shard]:
    """Returns the shards of process `index` of `count`; every shard belongs to exactly one process."""
    shards = [(name, i) for name, split in encoding.splits.items() for i in range(split.shards)]
    return shards[index::count]


def _splits(cfg: Config) -> list[str]:
    """Returns the splits that the config trains and evaluates on."""
    instances = evaluators.make(cfg.evaluators).values()
    evaluated = (split for evaluator in instances for split in evaluator.splits().values())
    return list(dict.fromkeys([cfg.data.train_split, *evaluated]))


def _describe(run: Path, vae: RestoredAutoencoder, cfg: Config, examples: dict[str, int]) -> Encoding:
    images = cfg.data
    if images.name == "latents":
        raise UserError("data.name='latents': encode reads images; give the config of the images")
    for name in images.train_transforms:
        if data.named_transform(name).random and name != "flip":
            raise UserError(
                f"data.train_transforms: {name!r} is random; latents can hold mirror images ('flip') and no "
                "more"
            )
    fixed = tuple(name for name in images.train_transforms if name != "flip")
    if fixed != images.eval_transforms:
        raise UserError(
            f"data.train_transforms={images.train_transforms}: images are cropped once, as in evaluation: "
            f"give, beside 'flip', what data.eval_transforms has, {images.eval_transforms}"
        )
    info = data.info(images)
    shape = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    try:
        mean, _ = jax.eval_shape(vae.moments, vae.params, shape)
    except UserError as e:
        raise UserError(f"run={run}: does not fit the images of {info.name}: {e}") from None
    return Encoding(
        name=info.name,
        num_classes=info.num_classes,
        shape=mean.shape[1:],
        views=1 + ("flip" in images.train_transforms),
        splits={split: Split.of(count) for split, count in examples.items()},
        run=str(run),
        weights=vae.digest,
        data=dataclasses.asdict(images),
    )


def _require_same(out: Path, encoding: Encoding) -> None:
    """Checks that the folder is absent or empty, or holds this encoding, complete or not.

    Raises:
        UserError: if it holds anything else.
    """
    description = read_json(out / BEGUN)
    if description is None:
        begun = (f".{BEGUN}.", LOCK)  # what is there if it was killed before it was described
        if out.exists() and (not out.is_dir() or any(not p.name.startswith(begun) for p in out.iterdir())):
            raise UserError(f"out={out}: is no folder of latents; choose another, nothing is written over")
        return
    old, new = flat(in_current_keys(description)), flat(dataclasses.asdict(encoding))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key not in CHANGE_NO_LATENT:
            raise UserError(
                f"out={out}: holds latents with {key}={old.get(key)!r}, not {new.get(key)!r}; choose another "
                "folder, nothing is written over"
            )


def _make_encoder(
    vae: RestoredAutoencoder, encoding: Encoding, mesh: jax.sharding.Mesh
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function uint8 [B, ..., H, W, C] -> float16 [B, views, 2, ..., h, w, Z].

    It runs on this process's devices.
    """
    batch_sharding, replicated = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, PartitionSpec())

    def apply(params: Any, images: jax.Array) -> jax.Array:
        x = scaled(images)
        views = [x, x[..., ::-1, :]][: encoding.views]
        moments = [jnp.stack(vae.moments(params, view), axis=1) for view in views]
        return jnp.stack(moments, axis=1).astype(jnp.float16)

    compiled, weights = jax.jit(tracing.trace_on_mesh(mesh, apply)), jax.device_put(vae.params, replicated)

    def encode_batch(images: np.ndarray) -> np.ndarray:
        """Computes the moments of a batch.

        Raises:
            UserError: if they are not finite in float16.
        """
        moments = np.asarray(compiled(weights, jax.device_put(images, batch_sharding)))
        if not np.isfinite(moments).all():
            raise UserError(f"run={encoding.run}: gives moments that are not finite or too large for float16")
        return moments

    return encode_batch


def _write(
    out: Path,
    encoding: Encoding,
    images: data.Data,
    sources: dict[str, Any],
    batch_size: int,
    moments: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Writes the shards of this process's share that do not exist yet."""
    shards = share(encoding, jax.process_index(), jax.process_count())
    missing = [shard for shard in shards if not encoding.path(out, *shard).exists()]
    total = sum(len(encoding.splits[split].span(i)) for split, i in missing)
    first = jax.process_index() == 0
    with Progress("encoding", total, "image", examples=1, show=first) as progress:
        for split, source in sources.items():
            spans = {i: encoding.splits[split].span(i)[::batch_size] for name, i in missing if name == split}
            starts = [start for span in spans.values() for start in span]
            with closing(data.host_batches(images, source, starts, batch_size)) as batches:
                for i, span in spans.items():
                    records = _records(encoding, split, i, len(span), batches, moments)
                    _write_shard(encoding.path(out, split, i), records, progress)


def _write_shard(path: Path, records: Iterator[np.ndarray], progress: Progress) -> None:
    with ShardWriter(path) as writer:
        for chunk in records:
            writer.write(chunk)
            progress.advance(len(chunk))


def _records(
    encoding: Encoding,
    split: str,
    shard: int,
    count: int,
    batches: Iterator[Any],
    moments: Callable[[np.ndarray], np.ndarray],
) -> Iterator[np.ndarray]:
    """Yields the records of a shard, from the next `count` batches."""
    left = len(encoding.splits[split].span(shard))
    for _ in range(count):
        batch = next(batches)
        records = np.empty(len(batch["label"]), encoding.layout)
        records["label"], records["moments"] = batch["label"], moments(batch["image"])
        yield records[:left]
        left -= len(records)


def _complete(out: Path, encoding: Encoding, vae: RestoredAutoencoder, train_split: str) -> Latents:
    """Checks that every shard is complete and writes `latents.json`, with the scale."""
    for split, i in share(encoding, 0, 1):
        require_whole(encoding.path(out, split, i), len(encoding.splits[split].span(i)))
    latents = Latents(**vars(encoding), scale=vae.model.latent_scale or 1.0)
    if vae.model.latent_scale is None:
        scale = unit_scale(LatentSource(out, train_split, latents))
        latents = dataclasses.replace(latents, scale=scale)
    write_json(out / MANIFEST, dataclasses.asdict(latents))
    for partial in out.glob(".*.array_record.*"):  # shards of processes that were killed
        partial.unlink(missing_ok=True)
    return latents


def unit_scale(source: LatentSource, chunk: int = 1024) -> float:
    """Computes the scale that gives the latents of a split unit variance, over all components together.

    As in Rombach et al. 2022, appendix G; every view of every example is counted once.
    """
    sums, count = np.zeros(3), 0
    starts = range(0, len(source), chunk)
    for start in track(starts, "measuring the scale", len(starts), examples=chunk):
        moments = source.records(np.arange(start, min(start + chunk, len(source))))["moments"]
        mean, logvar = np.moveaxis(moments.astype(np.float64), 2, 0)  # [N, views, h, w, Z] each
        sums += mean.sum(), (mean**2).sum(), np.exp(logvar).sum()
        count += mean.size
    mean_, square, variance = sums / count
    return 1.0 / math.sqrt(square - mean_**2 + variance)
