"""Latents: the moments that a trained autoencoder gives the images of a set, as array_record shards.

A folder holds `<split>-00000-of-00004.array_record`, ..., with a split's examples in their order, and
`latents.json`, which says what they are (`Latents`). A record is the label and, in float16, the mean and the
log-variance of the posterior: of the image, and with two views of its mirror image too.

float16 suffices. It rounds a mean by at most 2^-11 of its value: with latents of unit variance that lies well
below the least noise that a diffusion path adds to them, 0.01 at the first of the 1,000 linear steps of Ho
et al. 2020. Log-variances, clamped to [-30, 20], are rounded by at most 2^-7: 0.4 % of a standard deviation.
"""

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from scaling.data.sources import Columns
from scaling.data.transforms import generators
from scaling.errors import UserError
from scaling.files import read_json
from scaling.typed import typed

if TYPE_CHECKING:
    import jax

    from scaling.data.options import Data

MANIFEST = "latents.json"
SHARD = 10_000  # examples, at most: what stopping at a bad moment can cost
LEAST = 4  # shards of a split that has as many examples
AGAIN = "`scaling encode` with the same options writes it again"


@dataclass(frozen=True)
class Split:
    examples: int
    shards: int

    @classmethod
    def of(cls, examples: int) -> "Split":
        """The same shards whatever the number of hosts."""
        return cls(examples, min(examples, max(LEAST, math.ceil(examples / SHARD))))

    def span(self, shard: int) -> range:
        """The examples of a shard."""
        return range(shard * self.examples // self.shards, (shard + 1) * self.examples // self.shards)


@dataclass(frozen=True)
class Encoding:
    """What was encoded, by what, and in what form."""

    name: str  # of the images' set
    num_classes: int
    shape: tuple[int, int, int]  # [h, w, Z] of a latent
    views: int  # 1; or 2 with the mirror image, of which training draws one
    splits: dict[str, Split]
    run: str  # folder of the autoencoder's run
    weights: str  # digest of its weights
    data: dict[str, Any]  # the images' section of a config

    @property
    def layout(self) -> np.dtype[Any]:
        """A record's bytes."""
        return np.dtype([("label", "<i4"), ("moments", "<f2", (self.views, 2, *self.shape))])

    def path(self, folder: Path, split: str, shard: int) -> Path:
        return folder / f"{split}-{shard:05d}-of-{self.splits[split].shards:05d}.array_record"


@dataclass(frozen=True)
class Latents(Encoding):
    """A whole folder: what `latents.json` holds."""

    scale: float  # a model sees `scale` times the latent


def read(folder: Path) -> Latents:
    """What a folder holds. Raises UserError where it is none, or not a whole one."""
    found = read_json(folder / MANIFEST)
    if not isinstance(found, dict):
        raise UserError(f"data_dir={str(folder)!r}: has no whole {MANIFEST}; `scaling encode` makes one")
    return typed(Latents, found, str(folder / MANIFEST))


class ShardWriter:
    """Writes a shard under a temporary name; leaving the context without an error gives it its own.

    Raises: UserError where the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Self:
        from array_record.python.array_record_module import ArrayRecordWriter

        try:  # moments hardly compress, and single records are what training reads
            self._writer = ArrayRecordWriter(str(self.temporary), "group_size:1,uncompressed")
        except RuntimeError as e:
            raise self._failed(e) from e
        return self

    def write(self, records: np.ndarray) -> None:
        """Appends records [N] of an encoding's layout."""
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
    """Raises UserError unless the shard is there with that many records."""
    if not path.is_file():
        raise UserError(f"{path}: is not there; {AGAIN}")
    reader = _reader(path)
    found = reader.num_records()  # 0 where the end is missing, which has the index
    with contextlib.suppress(RuntimeError):  # says the same again
        reader.close()
    if found != examples:
        raise UserError(f"{path}: has {found} of {examples} records; delete it, and {AGAIN}")


def _reader(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), options="readahead_buffer_size:0")


class LatentSource:
    """A split of a folder: latents float32 [h, w, Z], times the scale, in the place of images.

    Training sees a draw from the posterior of one of the views, each time another (`draw`, and then, on the
    devices, `finish`). Evaluation (`read`) sees a fixed draw for the image as it is: from what training draws
    from, so that losses compare (posterior means are another distribution), and the same in every evaluation.

    Raises: UserError for a split or a shard that is not there, or not whole.
    """

    def __init__(self, folder: Path, split: str, latents: Latents) -> None:
        if split not in latents.splits:
            raise UserError(f"split {split!r}: {folder} has {', '.join(latents.splits)}")
        self.latents, self.name, self.num_classes = latents, latents.name, latents.num_classes
        self.image_shape = latents.shape
        self.examples = latents.splits[split].examples
        spans = [latents.splits[split].span(i) for i in range(latents.splits[split].shards)]
        self.starts = np.array([span.start for span in spans])
        self.paths = [latents.path(folder, split, i) for i in range(len(spans))]
        for path, span in zip(self.paths, spans, strict=True):
            require_whole(path, len(span))
        self._readers: list[Any] = [None] * len(spans)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": [None] * len(self.paths)}  # a worker process opens its own

    def __len__(self) -> int:
        return self.examples

    def read(self, indices: np.ndarray) -> Columns:
        """A fixed draw for each example: image float32 [N, h, w, Z], label int32 [N]."""
        found = self.records(indices)
        noise = np.empty((len(indices), *self.image_shape), np.float32)
        for one, rng in zip(noise, generators(0, indices), strict=True):
            rng.standard_normal(out=one, dtype=np.float32)
        moments = found["moments"][:, 0].astype(np.float32)  # [N, 2, h, w, Z]
        latent = moments[:, 0] + np.exp(np.float32(0.5) * moments[:, 1]) * noise
        return {"image": np.float32(self.latents.scale) * latent, "label": found["label"].astype(np.int32)}

    def draw(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        """What `finish` draws from: image float16 [N, 2, h, w, Z], mean and log-variance, label int32 [N].

        Of two views one is chosen, by the seed and the position in the stream.
        """
        found, view = self.records(indices), np.zeros(len(indices), np.int64)
        if self.latents.views == 2:
            view[:] = [rng.random() < 0.5 for rng in generators(seed, positions)]
        moments = found["moments"][np.arange(len(indices)), view]
        return {"image": moments, "label": found["label"].astype(np.int32)}

    def finish(self, batch: "dict[str, jax.Array]", key: "jax.Array") -> "dict[str, jax.Array]":
        """A draw for each of the moments of `draw`, on the devices: image float32 [N, h, w, Z], label [N].

        Normal numbers would be most of the host's work on a batch.
        """
        import jax
        import jax.numpy as jnp

        moments = batch["image"].astype(jnp.float32)
        mean, log_variance = moments[:, 0], moments[:, 1]  # [N, h, w, Z]
        noise = jax.random.normal(key, mean.shape)
        return {**batch, "image": self.latents.scale * (mean + jnp.exp(0.5 * log_variance) * noise)}

    def records(self, indices: np.ndarray) -> np.ndarray:
        """The records [N] as they are stored."""
        found = np.empty(len(indices), self.latents.layout)
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            if self._readers[shard] is None:
                self._readers[shard] = _reader(self.paths[shard])
            try:
                read = self._readers[shard].read((indices[rows] - self.starts[shard]).tolist())
                found[rows] = np.frombuffer(b"".join(read), self.latents.layout)
            except (RuntimeError, ValueError) as e:
                reason = str(e).partition("\n")[0]
                raise UserError(
                    f"{self.paths[shard]}: is damaged ({reason}); delete it, and {AGAIN}"
                ) from None
        return found


def latents(data: "Data", split: str) -> LatentSource:
    """A folder made by `scaling encode`: the latents of another set, under that set's name."""
    folder = Path(str(data.data_dir))
    return LatentSource(folder, split, read(folder))
