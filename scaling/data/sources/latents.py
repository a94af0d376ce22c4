"""Latents: the posterior moments that a trained autoencoder gives a set's images, as array_record shards.

A folder holds `<split>-00000-of-00004.array_record`, ..., with a split's examples in order, and
`latents.json`, which describes them (`Latents`). A record is the label and, in float16, the mean and the
log-variance of the posterior of the image; with two views, those of its mirror image too.

float16 suffices. It rounds a mean by at most 2^-11 of its value: for latents of unit variance that is well
below the smallest noise that a diffusion path adds to them, 0.01 at the first of the 1,000 linear steps of Ho
et al. 2020. Log-variances, clamped to [-30, 20], are rounded by at most 2^-7: 0.4 % of a standard deviation.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from scaling.data.sources.base import Columns
from scaling.data.transforms import generators
from scaling.errors import UserError
from scaling.files import read_json
from scaling.former_names import renamed
from scaling.validation import parse_dataclass

if TYPE_CHECKING:
    import jax

MANIFEST = "latents.json"
SHARD = 10_000  # maximum number of examples per shard: the work that an interruption can lose
LEAST = 4  # minimum number of shards of a split, unless it has fewer examples
AGAIN = "`scaling encode` with the same options writes it again"  # advice in errors


@dataclass(frozen=True)
class Split:
    """The sizes of a split: its examples, and the shards that they are divided into."""

    examples: int
    shards: int

    def __post_init__(self) -> None:
        if not 0 <= self.shards <= self.examples:
            raise UserError(f"shards={self.shards}: must be from 0 to the {self.examples} examples")

    @classmethod
    def of(cls, examples: int) -> "Split":
        """Returns the split of so many examples; its shards do not depend on the number of hosts."""
        return cls(examples, min(examples, max(LEAST, math.ceil(examples / SHARD))))

    def span(self, shard: int) -> range:
        """Returns the examples of a shard."""
        return range(shard * self.examples // self.shards, (shard + 1) * self.examples // self.shards)


@dataclass(frozen=True)
class Encoding:
    """A description of latents: the images, the autoencoder that encoded them, and the records' form."""

    name: str  # name of the images' data set
    num_classes: int
    shape: tuple[int, ...]  # [h, w, Z] of a latent, or [T, h, w, Z] of a clip, whose frames are encoded
    views: int  # views per image: 1, or 2 with the mirror image, of which training draws one
    splits: dict[str, Split]
    run: str  # folder of the autoencoder's run
    weights: str  # digest of the autoencoder's weights
    data: dict[str, Any]  # the `data` section that the images were read with

    def __post_init__(self) -> None:
        if self.views not in (1, 2):
            raise UserError(f"views={self.views}: must be 1 or 2")
        if len(self.shape) not in (3, 4) or min(self.shape) < 1:
            raise UserError(f"shape={self.shape}: must be [h, w, Z] or [T, h, w, Z], each at least 1")
        if self.num_classes < 0:
            raise UserError(f"num_classes={self.num_classes}: must be at least 0")

    @property
    def layout(self) -> np.dtype[Any]:
        """The layout of a record's bytes."""
        return np.dtype([("label", "<i4"), ("moments", "<f2", (self.views, 2, *self.shape))])

    def path(self, folder: Path, split: str, shard: int) -> Path:
        """Returns the path of a shard."""
        return folder / f"{split}-{shard:05d}-of-{self.splits[split].shards:05d}.array_record"


@dataclass(frozen=True)
class Latents(Encoding):
    """The content of `latents.json`: the description of a complete folder."""

    scale: float  # factor of the latents that a model sees


def read(folder: Path) -> Latents:
    """Reads the description of a folder of latents.

    Raises:
        UserError: if the folder does not exist, or is incomplete.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        raise UserError(f"data.data_dir={str(folder)!r}: has no whole {MANIFEST}; `scaling encode` makes one")
    return parse_dataclass(Latents, in_current_keys(manifest), str(folder / MANIFEST))


def in_current_keys(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an encoding's description whose `data` section has today's keys."""
    section = description.get("data", {})
    return {**description, **renamed({"data": section})} if isinstance(section, Mapping) else {**description}


class ShardWriter:
    """A context that writes a shard under a temporary name, and renames it on leaving without an error.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Self:
        from array_record.python.array_record_module import ArrayRecordWriter

        try:  # moments hardly compress, and training reads single records
            self._writer = ArrayRecordWriter(str(self.temporary), "group_size:1,uncompressed")
        except RuntimeError as e:
            raise self._failed(e) from e
        return self

    def write(self, records: np.ndarray) -> None:
        """Appends records [N] of an encoding's layout.

        Raises:
            UserError: if the disk is full.
        """
        try:
            for record in records:
                self._writer.write(record.tobytes())
        except RuntimeError as e:
            raise self._failed(e) from e

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._writer.close()
            if error is None:
                self.temporary.replace(self.path)
        except (OSError, RuntimeError) as e:
            if error is None:
                raise self._failed(e) from e
        finally:
            self.temporary.unlink(missing_ok=True)

    def _failed(self, error: Exception) -> UserError:
        reason = str(error).partition("\n")[0]
        return UserError(f"{self.path}: cannot be written ({reason}); free space or choose another folder")


def require_whole(path: Path, examples: int) -> None:
    """Checks that a shard exists and has that many records.

    Raises:
        UserError: if it does not.
    """
    if not path.is_file():
        raise UserError(f"{path}: is not there; {AGAIN}")
    reader = _reader(path)
    records = reader.num_records()  # 0 if the end of the file, which has the index, is missing
    with contextlib.suppress(RuntimeError):  # closing a damaged file is an error too
        reader.close()
    if records != examples:
        raise UserError(f"{path}: has {records} of {examples} records; delete it, and {AGAIN}")


def _reader(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), options="readahead_buffer_size:0")


class LatentSource:
    """A split of a folder: latents float32 [h, w, Z], times the scale, in place of images.

    Training sees a new draw every time from the posterior of one of the views (`read_train`, and then, on the
    devices, `device_transform`). Evaluation (`read`) sees a draw for the image itself, not mirrored, which is
    the same in every evaluation. It is from the distribution that training draws from, so that losses are
    comparable; posterior means have another distribution.

    Raises:
        UserError: if the split or one of its shards is missing or incomplete.
    """

    def __init__(self, folder: Path, split: str, latents: Latents) -> None:
        if split not in latents.splits:
            raise UserError(f"split {split!r}: {folder} has {', '.join(latents.splits)}")
        self.latents, self.name, self.num_classes = latents, latents.name, latents.num_classes
        self.image_shape = latents.shape
        self.examples = latents.splits[split].examples
        starts: list[int] = []
        self.paths: list[Path] = []
        for shard in range(latents.splits[split].shards):
            span = latents.splits[split].span(shard)
            starts.append(span.start)
            self.paths.append(latents.path(folder, split, shard))
            require_whole(self.paths[-1], len(span))
        self.starts = np.array(starts)
        self._readers: list[Any] = [None] * len(starts)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_readers": [None] * len(self.paths),
        }  # a worker process opens its own readers

    def __len__(self) -> int:
        return self.examples

    def read(self, indices: np.ndarray) -> Columns:
        """Returns a fixed draw for each example: image float32 [N, h, w, Z], label int32 [N]."""
        records = self.records(indices)
        noise = np.empty((len(indices), *self.image_shape), np.float32)
        for example_noise, rng in zip(noise, generators(0, indices), strict=True):
            rng.standard_normal(out=example_noise, dtype=np.float32)
        moments = records["moments"][:, 0].astype(np.float32)  # [N, 2, h, w, Z]
        latent = moments[:, 0] + np.exp(np.float32(0.5) * moments[:, 1]) * noise
        return {"image": np.float32(self.latents.scale) * latent, "label": records["label"].astype(np.int32)}

    def read_train(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        """Returns the moments for `device_transform`: image float16 [N, 2, h, w, Z], mean and log-variance.

        If there are two views, one is chosen by the seed and the position in the stream.
        """
        records, view = self.records(indices), np.zeros(len(indices), np.int64)
        if self.latents.views == 2:
            view[:] = [rng.random() < 0.5 for rng in generators(seed, positions)]
        moments = records["moments"][np.arange(len(indices)), view]
        return {"image": moments, "label": records["label"].astype(np.int32)}

    def device_transform(self, batch: "dict[str, jax.Array]", key: "jax.Array") -> "dict[str, jax.Array]":
        """Returns a draw from each of `read_train`'s posteriors: image float32 [N, h, w, Z], label [N].

        On the host, drawing normal numbers would be most of the work on a batch.
        """
        import jax
        import jax.numpy as jnp

        moments = batch["image"].astype(jnp.float32)
        mean, log_variance = moments[:, 0], moments[:, 1]  # [N, h, w, Z]
        noise = jax.random.normal(key, mean.shape)
        return {**batch, "image": self.latents.scale * (mean + jnp.exp(0.5 * log_variance) * noise)}

    def records(self, indices: np.ndarray) -> np.ndarray:
        """Returns records [N] as they are stored.

        Raises:
            UserError: if a shard is damaged.
        """
        records = np.empty(len(indices), self.latents.layout)
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            if self._readers[shard] is None:
                self._readers[shard] = _reader(self.paths[shard])
            try:
                raw = self._readers[shard].read((indices[rows] - self.starts[shard]).tolist())
                records[rows] = np.frombuffer(b"".join(raw), self.latents.layout)
            except (RuntimeError, ValueError) as e:
                reason = str(e).partition("\n")[0]
                raise UserError(
                    f"{self.paths[shard]}: is damaged ({reason}); delete it, and {AGAIN}"
                ) from None
        return records


def latents(folder: Path, split: str) -> LatentSource:
    """Opens a split of a folder made by `scaling encode`; it has the name of the set that was encoded."""
    return LatentSource(folder, split, read(folder))
