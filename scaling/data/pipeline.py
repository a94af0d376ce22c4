"""From a source to global batches on the devices: one order for any number of hosts, devices and workers.

Row r of step s is example s·B + r of the stream, so a batch is a pure function of its step. Grain reads
ahead, in the order of steps, with threads or worker processes; one of its elements is a host's whole share of
a batch.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import resource
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scaling.data.options import Data, image_shape, open_source, open_views
from scaling.data.sources.base import Columns, DeviceTransformed, Source, read_train
from scaling.data.transforms import EPOCH, transform
from scaling.data.video import ClipViews, Shuffled
from scaling.errors import UserError
from scaling.processes import end_with_parent

if TYPE_CHECKING:  # importing scaling.data stays fast, and the command line's --help needs no jax
    import jax
    from jax.sharding import NamedSharding

HostBatch = dict[str, np.ndarray]
Batches = Generator[dict[str, "jax.Array"], None, None]  # to be closed if they are not read to their end
OPEN_FILES, OPEN_FILES_PER_WORKER = 64, 16  # at once: of a checkpoint and memory that is freed; of pipes


@functools.lru_cache(maxsize=4)
def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the permutation int64 [examples] of one epoch.

    Sorting random words gives every permutation the same chance, and the words of Philox (Salmon et al.
    2011) are the same on every machine and NumPy version. Grain's own shuffle walks a 16-bit cipher for
    each example: 11 µs per example for 4,000 examples and 300 µs for 100, more than the rest of a batch.
    """
    words = np.random.Philox(key=(seed, EPOCH), counter=(0, 0, epoch, 0)).random_raw(examples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def shuffled(positions: np.ndarray, examples: int, seed: int) -> np.ndarray:
    """Returns the example at each position [N] of the endless stream, reshuffled every epoch."""
    epochs, offsets = np.divmod(positions, examples)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = epoch_order(examples, seed, int(epoch))[offsets[in_epoch]]
    return indices


def local_rows(
    sharding: "NamedSharding", batch_size: int, devices: "Sequence[jax.Device] | None" = None
) -> np.ndarray:
    """Returns the rows of the global batch that live on `devices` (this process's by default), ascending.

    `sharding` splits the leading dimension.

    Raises:
        UserError: if `sharding` does not divide the batch.
    """
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    ways = math.prod(sharding.mesh.shape[name] for name in names)
    if batch_size % ways:
        raise UserError(f"batch_size={batch_size}: must be a multiple of {ways}, the mesh's data devices")
    index = sharding.devices_indices_map((batch_size,))
    local_devices = sharding.addressable_devices if devices is None else devices
    return np.unique(np.concatenate([np.arange(batch_size)[index[device]] for device in local_devices]))


def _require_labels(source: Source, columns: Columns, indices: np.ndarray) -> None:
    """Checks that every label is one of the source's classes, which no loss or metric checks.

    Raises:
        UserError: if a label is not.
    """
    labels = columns.get("label")
    if labels is None:
        return
    invalid = np.flatnonzero((labels < 0) | (labels >= source.num_classes))
    if len(invalid):
        label, example = int(labels[invalid[0]]), int(indices[invalid[0]])
        clips = source.source if isinstance(source, Shuffled) else source
        if isinstance(clips, ClipViews):
            example //= clips.views
        reason = (
            "which stands for none: this split has no labels; name one that has"
            if label == -1
            else f"and its classes are 0 to {source.num_classes - 1}; mend the labels"
        )
        raise UserError(f"{source.name}: example {example} has label {label}, {reason}")


def _transform_and_stack(
    columns: Columns, names: Sequence[str], size: int, seed: int, positions: np.ndarray
) -> HostBatch:
    """Returns columns as arrays, after the named transforms of the images."""
    if names:
        columns["image"] = transform(columns["image"], names, size, seed, positions)
    return {name: x if isinstance(x, np.ndarray) else np.stack(x) for name, x in columns.items()}


def train_rows(step: int, source: Source, data: Data, seed: int, rows: np.ndarray) -> HostBatch:
    """Returns the given rows of training step `step`: columns such as image uint8 [rows, H, W, C]."""
    positions = step * data.batch_size + rows
    indices = shuffled(positions, len(source), seed)
    columns = read_train(source, indices, seed, positions)
    _require_labels(source, columns, indices)
    return _transform_and_stack(columns, data.train_transforms, data.image_size or 0, seed, positions)


def eval_rows(step: int, source: Source, data: Data, batch_size: int, rows: np.ndarray) -> HostBatch:
    """Returns the given rows of evaluation batch `step` and mask float32 [rows]: 0 past the last example."""
    positions = step * batch_size + rows
    indices = np.minimum(positions, len(source) - 1)  # padding has the shape of a real example
    columns = source.read(indices)
    _require_labels(source, columns, indices)
    batch = _transform_and_stack(columns, data.eval_transforms, data.image_size or 0, 0, positions)
    return {**batch, "mask": (positions < len(source)).astype(np.float32)}


def _require_open_files(workers: int) -> None:
    """Checks that this process may open what reading by worker processes takes at least, in pipes and memory.

    Raises:
        UserError: if it may not.
    """
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = sum(1 for _ in Path("/dev/fd").iterdir()) + OPEN_FILES + OPEN_FILES_PER_WORKER * workers
    if resource.RLIM_INFINITY != allowed < needed:
        raise UserError(
            f"data.workers={workers}: takes {needed} open files, and the system allows {allowed}; raise that "
            "(ulimit -n), or lower data.workers"
        )


def _read_ahead(
    read: Callable[[int], HostBatch], start: int, stop: int, data: Data, workers: int
) -> Generator[HostBatch, None, None]:
    """Yields read(start), ..., read(stop - 1), in order, computed before they are needed."""
    import grain

    buffer_size = max(data.prefetch, data.threads)
    read_options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=buffer_size)
    batches = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(read_options)
    if workers:
        _require_open_files(workers)
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain can only hand parsed absl flags to its workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=data.prefetch)
        batches = batches.mp_prefetch(options, end_with_parent)
    yield from batches  # closing this generator closes grain's, and with it the threads and processes


def _rows_from_start(i: int, source: Source, data: Data, batch_size: int, starts: Sequence[int]) -> HostBatch:
    return eval_rows(0, source, data, batch_size, starts[i] + np.arange(batch_size))


def host_batches(
    data: Data, source: Source, starts: Sequence[int], batch_size: int
) -> Generator[HostBatch, None, None]:
    """Returns batches of examples starts[i], starts[i] + 1, ... as evaluation sees them, on this host alone.

    Each is like a batch of `eval_rows`: past the last example it is padded with mask 0.
    """
    read = functools.partial(_rows_from_start, source=source, data=data, batch_size=batch_size, starts=starts)
    return _read_ahead(read, 0, len(starts), data, data.workers)


def _on_devices(
    host: Generator[HostBatch, None, None],
    rows: np.ndarray,
    sharding: "NamedSharding",
    batch_size: int,
    prefetch: int,
) -> Batches:
    """Yields global arrays [B, ...] of each host batch, with transfers started `prefetch` batches early."""
    import jax

    def to_devices(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:  # a device's rows are contiguous in `local`
            assert index is not None  # jax's type allows for a device without a share
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return local[first : first + stop - start]

        # On one device this takes a third of make_array_from_process_local_data's time, which matters for
        # small models.
        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    ready: collections.deque[dict[str, jax.Array]] = collections.deque()
    with contextlib.closing(host):
        for batch in host:
            ready.append({name: to_devices(local) for name, local in batch.items()})
            if len(ready) > prefetch:
                yield ready.popleft()
        yield from ready


def train_batches(data: Data, seed: int, start_step: int, sharding: "NamedSharding") -> Batches:
    """Returns the batches of steps start_step, start_step + 1, ... without end, placed by `sharding`.

    Each has the source's columns (`Info.columns`). Batch s is the same for any `start_step`, devices and
    hosts; a host reads only the rows that its devices hold.

    Raises:
        UserError: before the first batch, if the data are missing, images differ in size, or the mesh does
            not divide the batch.
    """
    source = open_source(data, data.train_split)
    image_shape(data, source)
    rows = local_rows(sharding, data.batch_size)
    read = functools.partial(train_rows, source=source, data=data, seed=seed, rows=rows)
    host = _read_ahead(read, start_step, 2**62, data, data.workers)
    batches = _on_devices(host, rows, sharding, data.batch_size, data.prefetch)
    return (
        _transform_on_devices(batches, source, seed, start_step, sharding)
        if isinstance(source, DeviceTransformed)
        else batches
    )


def _transform_on_devices(
    batches: Batches,
    source: DeviceTransformed,
    seed: int,
    start: int,
    sharding: "NamedSharding",
) -> Batches:
    """Yields batches after the source's `device_transform`, that of step s with the key of (seed, s).

    Random numbers have the shape of the global batch, so they are the same on any mesh.
    """
    import jax

    from scaling.randomness import derive_key

    def transform_batch(batch: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
        return source.device_transform(
            batch, jax.random.fold_in(derive_key(jax.random.key(seed), "finish"), step)
        )

    compiled = jax.jit(transform_batch, out_shardings=sharding)
    with contextlib.closing(batches):
        for step, batch in enumerate(batches, start):
            yield compiled(batch, np.uint32(step))


def eval_batches(data: Data, split: str, batch_size: int, sharding: "NamedSharding") -> Batches:
    """Returns batches of every example of a split once, in order: the source's columns and mask float32 [B].

    The last batch is padded to `batch_size` with mask 0. Threads read, never worker processes: starting
    those would take longer than most evaluations.

    Raises:
        UserError: before the first batch, as in `train_batches`.
    """
    return _eval_pass(data, open_source(data, split), batch_size, sharding)


def cyclic_batches(
    data: Data, split: str, batch_size: int, sharding: "NamedSharding", batches: int
) -> Batches:
    """Returns `batches` full batches of a split as evaluation sees it, in order; example 0 follows the last.

    Raises:
        UserError: before the first batch, as in `train_batches`.
    """
    source = open_source(data, split)
    image_shape(data, source)
    rows = local_rows(sharding, batch_size)

    def read(step: int) -> HostBatch:
        return eval_rows(0, source, data, batch_size, (step * batch_size + rows) % len(source))

    return _on_devices(_read_ahead(read, 0, batches, data, 0), rows, sharding, batch_size, data.prefetch)


def view_batches(
    data: Data, split: str, views: tuple[int, int], batch_size: int, sharding: "NamedSharding"
) -> Batches:
    """Returns batches as `eval_batches` does, with every example as views[0] x views[1] clips.

    There are views[0] clips in time and views[1] crops in space. `batch_size` counts clips. Row r of the
    stream is a view of example r // (views[0] * views[1]).
    """
    source = open_views(data, split, *views)
    # The source has cropped the clips already.
    cropped = dataclasses.replace(data, image_size=None, train_transforms=(), eval_transforms=())
    return _eval_pass(cropped, source, batch_size, sharding)


def _eval_pass(data: Data, source: Source, batch_size: int, sharding: "NamedSharding") -> Batches:
    """Returns batches of all examples of a source, in order."""
    image_shape(data, source)
    rows = local_rows(sharding, batch_size)
    read = functools.partial(eval_rows, source=source, data=data, batch_size=batch_size, rows=rows)
    host = _read_ahead(read, 0, math.ceil(len(source) / batch_size), data, 0)
    return _on_devices(host, rows, sharding, batch_size, data.prefetch)
