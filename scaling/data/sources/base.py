"""The protocols of random-access sources, and the classes that most sources are made of.

`source.read(indices)` returns columns, such as "image" uint8 [N, H, W, C] and "label" int32 [N], for many
examples at once, which for arrays is a single lookup. Python code for each example would take longer than a
small model's step.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import jax

Columns = dict[str, Any]  # arrays [N, ...], or a list of N arrays that differ in size


class Source(Protocol):
    """Examples by index; several threads may read at the same time, and each worker process has a copy."""

    @property
    def name(self) -> str: ...

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 if examples have no label."""
        ...

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """The shape [H, W, C], or [T, H, W, C] of videos, with None for a side that differs between them."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Columns:
        """Returns new columns of these examples as evaluation sees them, "image" among them."""
        ...


@runtime_checkable
class RandomSource(Source, Protocol):
    """A source with random augmentation: training sees a new view of each example every time."""

    def read_train(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        """Returns columns like `read`; its random draws depend on the seed and the stream position alone."""
        ...


@runtime_checkable
class DeviceTransformed(Source, Protocol):
    """A source whose training batches are completed on the devices, where that is faster."""

    def device_transform(self, batch: "dict[str, jax.Array]", key: "jax.Array") -> "dict[str, jax.Array]":
        """Returns the global batch as training sees it, from columns of `read_train`; called under `jax.jit`.

        `key` is the source of all randomness.
        """
        ...


def read_train(source: Source, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
    """Returns columns of any source as training sees them: those of its `read_train`, or else of `read`."""
    if isinstance(source, RandomSource):
        return source.read_train(indices, seed, positions)
    return source.read(indices)


@dataclass(frozen=True)
class Wrapped:
    """A source that changes what another one reads; the base of such classes."""

    source: Any

    @property
    def name(self) -> str:
        return str(self.source.name)

    @property
    def num_classes(self) -> int:
        return int(self.source.num_classes)

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        return tuple(self.source.image_shape)

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class ArraySource:
    """A source of images that fit in memory."""

    name: str
    num_classes: int
    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]

    def __post_init__(self) -> None:
        self.images.flags.writeable = False  # one copy serves every reader of the process
        self.labels.flags.writeable = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> Columns:
        return {"image": self.images[indices], "label": self.labels[indices]}
