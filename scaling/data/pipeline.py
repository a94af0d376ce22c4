"""From a source to global batches on the devices: one order for any number of hosts, devices and workers.

Row r of step s is example s·B + r of the stream, so a batch is a pure function of its step. Grain reads
steps ahead, in order, with threads or worker processes; an element is a host's whole share of a batch.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from scaling.data.options import Data, image_shape, open_source, open_views
from scaling.data.sources import Columns, Finished, Source, drawn
from scaling.data.transforms import EPOCH, transform
from scaling.data.video import Shuffled, Views
from scaling.errors import UserError

if TYPE_CHECKING:  # importing scaling.data stays quick: the command line's --help needs no jax
    import jax
    from jax.sharding import NamedSharding

HostBatch = dict[str, np.ndarray]


@functools.lru_cache(maxsize=4)
def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation int64 [examples] of one epoch.

    Sorting random words gives every permutation the same chance, and the words of Philox (Salmon et al.
    2011) are the same on every machine and NumPy version. Grain's own shuffle walks a 16-bit cipher for
    each example: 11 µs for each of 4,000 and 300 µs for each of 100, more than the rest of a batch.
    """
    words = np.random.Philox(key=(seed, EPOCH), counter=(0, 0, epoch, 0)).random_raw(examples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def shuffled(positions: np.ndarray, examples: int, seed: int) -> np.ndarray:
    """The example at each position [N] of the endless stream, reshuffled every epoch."""
    epochs, offsets = np.divmod(positions, examples)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        indices[now] = epoch_order(examples, seed, int(epoch))[offsets[now]]
    return indices


def local_rows(
    sharding: "NamedSharding", batch_size: int, devices: "Sequence[jax.Device] | None" = None
) -> np.ndarray:
    """Rows of the global batch that live on `devices` (this process's by default), ascending.

    `sharding` splits the leading dimension. Raises UserError when it does not divide the batch.
    """
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    ways = math.prod(sharding.mesh.shape[name] for name in names)
    if batch_size % ways:
        raise UserError(f"batch_size={batch_size}: must be a multiple of {ways}, the mesh's data devices")
    index = sharding.devices_indices_map((batch_size,))
    here = sharding.addressable_devices if devices is None else devices
    return np.unique(np.concatenate([np.arange(batch_size)[index[device]] for device in here]))


def _require_labels(source: Source, columns: Columns, indices: np.ndarray) -> None:
    """Raises UserError for a label that is none of the source's classes: no loss or metric would."""
    labels = columns.get("label")
    if labels is None:
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= source.num_classes))
    if len(wrong):
        label, example = int(labels[wrong[0]]), int(indices[wrong[0]])
        clips = source.source if isinstance(source, Shuffled) else source
        if isinstance(clips, Views):
            example //= clips.views
        why = (
            "which stands for none: this split has no labels; name one that has"
            if label == -1
            else f"and its classes are 0 to {source.num_classes - 1}; mend the labels"
        )
        raise UserError(f"{source.name}: example {example} has label {label}, {why}")


def _batch(columns: Columns, names: Sequence[str], size: int, seed: int, positions: np.ndarray) -> HostBatch:
    if names:
        columns["image"] = transform(columns["image"], names, size, seed, positions)
    return {name: x if isinstance(x, np.ndarray) else np.stack(x) for name, x in columns.items()}


def train_rows(step: int, source: Source, data: Data, seed: int, rows: np.ndarray) -> HostBatch:
    """The given rows of training step `step`: the source's columns, such as image uint8 [rows, H, W, C]."""
    positions = step * data.batch_size + rows
    indices = shuffled(positions, len(source), seed)
    columns = drawn(source, indices, seed, positions)
    _require_labels(source, columns, indices)
    return _batch(columns, data.augment, data.image_size or 0, seed, positions)


def eval_rows(step: int, source: Source, data: Data, batch_size: int, rows: np.ndarray) -> HostBatch:
    """The given rows of evaluation batch `step`, with mask float32 [rows]: 0 past the last example."""
    positions = step * batch_size + rows
    indices = np.minimum(positions, len(source) - 1)  # padding has the shape of a real example
    columns = source.read(indices)
    _require_labels(source, columns, indices)
    batch = _batch(columns, data.eval_transforms, data.image_size or 0, 0, positions)
    return {**batch, "mask": (positions < len(source)).astype(np.float32)}


def fingerprint(data: Data, split: str, examples: int = 64) -> str:
    """Returns a digest of how many examples a split has, and of some images as evaluation sees them.

    These lie evenly over the split: a set that was made anew has another, at the price of a few images.
    """
    source = open_source(data, split)
    rows = np.unique(np.linspace(0, len(source) - 1, examples).astype(np.int64))
    image = eval_rows(0, source, data, len(source), rows)["image"]
    return hashlib.sha256(f"{len(source)} {image.shape}".encode() + image.tobytes()).hexdigest()[:16]


def _read_ahead(
    read: Callable[[int], HostBatch], start: int, stop: int, data: Data, workers: int
) -> Generator[HostBatch, None, None]:
    """read(start), ..., read(stop - 1), in order, computed before they are asked for."""
    import grain

    ahead = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads))
    batches = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(ahead)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain hands absl's flags to its workers, parsed or not at all
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=data.prefetch)
        batches = batches.mp_prefetch(options)
    yield from batches  # closing this generator closes grain's, and so its threads and processes


def _stretch(i: int, source: Source, data: Data, batch_size: int, starts: Sequence[int]) -> HostBatch:
    return eval_rows(0, source, data, batch_size, starts[i] + np.arange(batch_size))


def host_batches(
    data: Data, source: Source, starts: Sequence[int], batch_size: int
) -> Generator[HostBatch, None, None]:
    """Batch i holds examples starts[i], starts[i] + 1, ... as evaluation sees them: on this host alone.

    Each is as that of `eval_rows`; past the last example it is padded with mask 0.
    """
    read = functools.partial(_stretch, source=source, data=data, batch_size=batch_size, starts=starts)
    return _read_ahead(read, 0, len(starts), data, data.workers)


def _on_devices(
    host: Generator[HostBatch, None, None],
    rows: np.ndarray,
    sharding: "NamedSharding",
    batch_size: int,
    prefetch: int,
) -> Iterator[dict[str, "jax.Array"]]:
    """Global arrays [B, ...] of each host batch, with transfers started `prefetch` batches early."""
    import jax

    def place(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:  # a device's rows are a stretch of ours
            assert index is not None  # jax's type allows for a device without a share
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return local[first : first + stop - start]

        # On one device a third of make_array_from_process_local_data's time: that matters to small models.
        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    ready: collections.deque[dict[str, jax.Array]] = collections.deque()
    with contextlib.closing(host):
        for batch in host:
            ready.append({name: place(local) for name, local in batch.items()})
            if len(ready) > prefetch:
                yield ready.popleft()
        yield from ready


def train_batches(
    data: Data, seed: int, start_step: int, sharding: "NamedSharding"
) -> Iterator[dict[str, "jax.Array"]]:
    """Batches of steps start_step, start_step + 1, ... without end, placed by `sharding`.

    Each has the source's columns (`Info.columns`). Batch s is the same whatever `start_step`, the devices and
    the hosts; a host reads only the rows that its devices hold. Raises UserError, before
    the first batch, for data that are not there, of many sizes, or in batches that the mesh does not divide.
    """
    source = open_source(data, data.train_split)
    image_shape(data, source)
    rows = local_rows(sharding, data.batch_size)
    read = functools.partial(train_rows, source=source, data=data, seed=seed, rows=rows)
    host = _read_ahead(read, start_step, 2**62, data, data.workers)
    batches = _on_devices(host, rows, sharding, data.batch_size, data.prefetch)
    return _finished(batches, source, seed, start_step, sharding) if isinstance(source, Finished) else batches


def _finished(
    batches: Iterator[dict[str, "jax.Array"]],
    source: Finished,
    seed: int,
    start: int,
    sharding: "NamedSharding",
) -> Iterator[dict[str, "jax.Array"]]:
    """Of step s with the key of (seed, s): numbers shaped by the global batch, on any mesh the same."""
    import jax

    from scaling.randomness import stream

    def finish(batch: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
        return source.finish(batch, jax.random.fold_in(stream(jax.random.key(seed), "finish"), step))

    compiled = jax.jit(finish, out_shardings=sharding)
    with contextlib.closing(batches):  # type: ignore[type-var]
        for step, batch in enumerate(batches, start):
            yield compiled(batch, np.uint32(step))


def eval_batches(
    data: Data, split: str, batch_size: int, sharding: "NamedSharding"
) -> Iterator[dict[str, "jax.Array"]]:
    """Every example of a split exactly once, in order: the source's columns and mask float32 [B].

    The last batch is padded to `batch_size` with mask 0. Threads read, never worker processes: starting
    those would take longer than most evaluations. Raises as `train_batches` does.
    """
    return _once_through(data, open_source(data, split), batch_size, sharding)


def view_batches(
    data: Data, split: str, views: tuple[int, int], batch_size: int, sharding: "NamedSharding"
) -> Iterator[dict[str, "jax.Array"]]:
    """As `eval_batches`, with every example as views[0] x views[1] clips, in time and in space, in turn.

    `batch_size` counts clips. Row r of the stream is a view of example r // (views[0] * views[1]).
    """
    source = open_views(data, split, *views)
    cropped = dataclasses.replace(data, image_size=None, augment=(), eval_transforms=())  # by the source
    return _once_through(cropped, source, batch_size, sharding)


def _once_through(
    data: Data, source: Source, batch_size: int, sharding: "NamedSharding"
) -> Iterator[dict[str, "jax.Array"]]:
    image_shape(data, source)
    rows = local_rows(sharding, batch_size)
    read = functools.partial(eval_rows, source=source, data=data, batch_size=batch_size, rows=rows)
    host = _read_ahead(read, 0, math.ceil(len(source) / batch_size), data, 0)
    return _on_devices(host, rows, sharding, batch_size, data.prefetch)
