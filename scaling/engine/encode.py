"""`scaling encode`: the images of a set as a folder of latents, to train on with `data.name='latents'`."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from scaling import data
from scaling.data.latents import MANIFEST, Encoding, Latents, LatentSource, ShardWriter, Split, require_whole
from scaling.engine import autoencoder, config, sharding, tracing
from scaling.engine.autoencoder import Autoencoder
from scaling.engine.evaluator import require_images
from scaling.errors import UserError
from scaling.files import read_json, write_json
from scaling.objectives.base import scaled

BEGUN = "encoding.json"  # what the folder is to hold, from its first moment
FREE = ("run", "data.batch_size", "data.threads", "data.workers", "data.prefetch")  # change no latent
Shard = tuple[str, int]  # split, number


def encode(run: Path, cfg: config.Config, out: Path, batch_size: int) -> Latents | None:
    """Writes the folder `out`: the moments that the autoencoder of `run` gives the images of `cfg.data`.

    Its splits are those that the config trains and evaluates on. The same command goes on where it was
    stopped: shards that are there are kept. Of several processes each writes its share, and the first one
    completes the folder and returns what it holds.

    Raises: UserError for a run or data that do not fit, a folder that holds anything else, a full disk.
    """
    vae = autoencoder.restore(run)
    shape = data.info(cfg.data).image_shape
    for split in _splits(cfg):
        require_images(cfg.data, split, shape, "split")
    sources = {split: data.open_source(cfg.data, split) for split in _splits(cfg)}
    encoding = _describe(run, vae, cfg, {split: len(source) for split, source in sources.items()})
    _same(out, encoding)
    mesh = sharding.make_mesh(config.Mesh(), jax.local_devices())  # a process encodes alone
    sharding.batch_sharding(mesh, batch_size, "batch-size")
    _wait("checked")  # a process still checking must not find the folder half made
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"out={out}: cannot be made ({e.strerror}); choose another folder") from None
    first = jax.process_index() == 0
    if first and not (out / BEGUN).exists():
        write_json(out / BEGUN, dataclasses.asdict(encoding))
    moments = _moments(vae, encoding, mesh)
    _write(out, encoding, cfg.data, sources, batch_size, moments)
    _wait("encoded")
    return _complete(out, encoding, vae, cfg.data.train_split) if first else None


def _wait(for_what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(for_what)


def share(encoding: Encoding, index: int, count: int) -> list[Shard]:
    """The shards of process `index` of `count`: every shard is exactly one process's."""
    every = [(split, i) for split, examples in encoding.splits.items() for i in range(examples.shards)]
    return every[index::count]


def _splits(cfg: config.Config) -> list[str]:
    read = (evaluator.split for evaluator in cfg.evaluate.values() if hasattr(evaluator, "split"))
    return list(dict.fromkeys([cfg.data.train_split, *read]))


def _describe(run: Path, vae: Autoencoder, cfg: config.Config, examples: dict[str, int]) -> Encoding:
    images = cfg.data
    if images.name == "latents":
        raise UserError("data.name='latents': encode reads images; give the config of the images")
    for name in images.augment:
        if data.named_transform(name).random and name != "flip":
            raise UserError(
                f"data.augment: {name!r} is random; latents can hold mirror images ('flip') and no more"
            )
    fixed = tuple(name for name in images.augment if name != "flip")
    if fixed != images.eval_transforms:
        raise UserError(
            f"data.augment={images.augment}: images are cropped once, as in evaluation: give, beside 'flip', "
            f"what data.eval_transforms has, {images.eval_transforms}"
        )
    info = data.info(images)
    shape = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    try:
        mean, _ = jax.eval_shape(
            lambda p, x: vae.model.apply(p, x, method="moments"), {"params": vae.params}, shape
        )
    except UserError as e:
        raise UserError(f"run={run}: does not fit the images of {info.name}: {e}") from None
    return Encoding(
        name=info.name,
        num_classes=info.num_classes,
        shape=mean.shape[1:],
        views=1 + ("flip" in images.augment),
        splits={split: Split.of(count) for split, count in examples.items()},
        run=str(run),
        weights=vae.digest,
        data=dataclasses.asdict(images),
    )


def _same(out: Path, encoding: Encoding) -> None:
    """Raises UserError if the folder holds something else than this encoding, or its beginning."""
    there = read_json(out / BEGUN)
    if there is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"out={out}: is no folder of latents; choose another, nothing is written over")
        return
    old, new = config.flat(there), config.flat(dataclasses.asdict(encoding))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key not in FREE:
            raise UserError(
                f"out={out}: holds latents with {key}={old.get(key)!r}, not {new.get(key)!r}; choose another "
                "folder, nothing is written over"
            )


def _moments(
    vae: Autoencoder, encoding: Encoding, mesh: jax.sharding.Mesh
) -> Callable[[np.ndarray], np.ndarray]:
    """Images uint8 [B, H, W, C] -> float16 [B, views, 2, h, w, Z], computed on this process's devices."""
    place, params = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, PartitionSpec())

    def apply(params: Any, images: jax.Array) -> jax.Array:
        x = scaled(images)
        views = [x, x[:, :, ::-1]][: encoding.views]
        found = [jnp.stack(vae.model.apply({"params": params}, v, method="moments"), axis=1) for v in views]
        return jnp.stack(found, axis=1).astype(jnp.float16)

    compiled, weights = jax.jit(tracing.on(mesh, apply)), jax.device_put(vae.params, params)

    def moments(images: np.ndarray) -> np.ndarray:
        found = np.asarray(compiled(weights, jax.device_put(images, place)))
        if not np.isfinite(found).all():
            raise UserError(f"run={encoding.run}: gives moments that are not finite or too large for float16")
        return found

    return moments


def _write(
    out: Path,
    encoding: Encoding,
    images: data.Data,
    sources: dict[str, Any],
    batch_size: int,
    moments: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Writes the shards of this process's share that are not there yet."""
    mine = share(encoding, jax.process_index(), jax.process_count())
    mine = [shard for shard in mine if not encoding.path(out, *shard).exists()]
    left = sum(len(encoding.splits[split].span(i)) for split, i in mine)
    every = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    quiet = jax.process_index() > 0
    with tqdm(total=left, unit="image", desc="encoding", mininterval=every, disable=quiet) as bar:
        for split, source in sources.items():
            spans = {i: encoding.splits[split].span(i)[::batch_size] for name, i in mine if name == split}
            starts = [start for span in spans.values() for start in span]
            with closing(data.host_batches(images, source, starts, batch_size)) as batches:
                for i, span in spans.items():
                    records = _records(encoding, split, i, len(span), batches, moments)
                    _write_shard(encoding.path(out, split, i), records, bar)


def _write_shard(path: Path, records: Iterator[np.ndarray], bar: Any) -> None:
    with ShardWriter(path) as writer:
        for some in records:
            writer.write(some)
            bar.update(len(some))


def _records(
    encoding: Encoding,
    split: str,
    shard: int,
    count: int,
    batches: Iterator[Any],
    moments: Callable[[np.ndarray], np.ndarray],
) -> Iterator[np.ndarray]:
    """The records of a shard, of the next `count` batches."""
    left = len(encoding.splits[split].span(shard))
    for _ in range(count):
        batch = next(batches)
        records = np.empty(len(batch["label"]), encoding.layout)
        records["label"], records["moments"] = batch["label"], moments(batch["image"])
        yield records[:left]
        left -= len(records)


def _complete(out: Path, encoding: Encoding, vae: Autoencoder, train_split: str) -> Latents:
    """Checks that every shard is there and writes `latents.json`, with the scale."""
    for split, i in share(encoding, 0, 1):
        require_whole(encoding.path(out, split, i), len(encoding.splits[split].span(i)))
    latents = Latents(**vars(encoding), scale=vae.model.latent_scale or 1.0)
    if vae.model.latent_scale is None:
        scale = unit_scale(LatentSource(out, train_split, latents))
        latents = dataclasses.replace(latents, scale=scale)
    write_json(out / MANIFEST, dataclasses.asdict(latents))
    for left in out.glob(".*.array_record.*"):  # by processes that were killed
        left.unlink(missing_ok=True)
    return latents


def unit_scale(source: LatentSource, chunk: int = 1024) -> float:
    """The scale that gives the latents of a split unit variance, over all components together.

    As in Rombach et al. 2022, appendix G; every view of every example is counted once.
    """
    sums, count = np.zeros(3), 0
    for start in tqdm(range(0, len(source), chunk), unit="batch", desc="measuring the scale", disable=None):
        moments = source.records(np.arange(start, min(start + chunk, len(source))))["moments"]
        mean, logvar = np.moveaxis(moments.astype(np.float64), 2, 0)  # [N, views, h, w, Z] each
        sums += mean.sum(), (mean**2).sum(), np.exp(logvar).sum()
        count += mean.size
    mean_, square, variance = sums / count
    return 1.0 / math.sqrt(square - mean_**2 + variance)
