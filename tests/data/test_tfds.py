"""TFDS sets: mocks of cifar10 and imagenet2012, and a small set written to and read from disk."""

import dataclasses
import importlib.util
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.sharding import NamedSharding, PartitionSpec
from PIL import ExifTags, Image

from scaling.data import (
    Data,
    eval_batches,
    info,
    open_source,
    open_views,
    tokenizer_of,
    train_batches,
    view_batches,
)
from scaling.data.pairs import Tokenized
from scaling.data.video import Video
from scaling.errors import UserError
from tests.support.tfds_mock import mocked, png

CIFAR = Data(name="tfds", builder="cifar10", batch_size=8, train_transforms=("pad_crop", "flip"))
IMAGENET = Data(
    name="tfds",
    builder="imagenet2012",
    batch_size=8,
    image_size=16,
    train_transforms=("random_resized_crop", "flip"),
    eval_transforms=("center_crop",),
)


def sharding() -> NamedSharding:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


@pytest.mark.parametrize(
    ("data", "classes", "shape"), [(CIFAR, 10, (32, 32, 3)), (IMAGENET, 1000, (16, 16, 3))]
)
def test_mocked_sets_train_and_evaluate(data: Data, classes: int, shape: tuple[int, int, int]) -> None:
    with tfds.testing.mock_data(as_data_source_fn=mocked):
        found = info(data)
        assert (found.name, found.num_classes) == (data.builder, classes)
        assert (found.image_shape, found.train_examples) == (shape, 11)
        stream = train_batches(data, 0, 0, sharding())
        for _ in range(2):
            batch = next(stream)
            assert batch["image"].shape == (8, *shape)
            assert batch["image"].dtype == np.uint8
            assert batch["label"].dtype == np.int32
        batches = list(eval_batches(data, "validation", 8, sharding()))
    assert [batch["image"].shape for batch in batches] == [(8, *shape)] * 2
    assert sum(float(batch["mask"].sum()) for batch in batches) == 11


def test_images_of_many_sizes_need_a_size() -> None:
    data = Data(name="tfds", builder="imagenet2012", batch_size=8)
    with tfds.testing.mock_data(num_examples=3):
        for use in (
            lambda: info(data),
            lambda: train_batches(data, 0, 0, sharding()),
            lambda: eval_batches(data, "validation", 8, sharding()),
        ):
            with pytest.raises(UserError, match="image_size=None: images of imagenet2012 differ in size"):
                use()


class ScalingTestSquares(tfds.core.GeneratorBasedBuilder):
    """Squares of one shade, which is the index; PNG bytes, which TFDS stores without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> Any:
        return {"train": self._generate_examples(7)}

    def _generate_examples(self, count: int) -> Iterator[Any]:
        for index in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(file, "PNG")
            yield index, {"image": file.getvalue(), "label": index % 3}


class ScalingTestNoLabel(ScalingTestSquares):
    def _info(self) -> Any:
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 3))})
        return tfds.core.DatasetInfo(builder=self, features=features)


class ScalingTestCaptions(ScalingTestSquares):
    """With two captions each, as coco_captions has them."""

    def _info(self) -> Any:
        several = tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64})
        features = {"image": tfds.features.Image(shape=(8, 8, 3)), "captions": several}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count: int) -> Iterator[Any]:
        for index, example in super()._generate_examples(count):
            texts = [f"a square of {index}", f"shade {index}"]
            captions = [{"text": text, "id": i} for i, text in enumerate(texts)]
            yield index, {"image": example["image"], "captions": captions}


class ScalingTestText(ScalingTestSquares):
    """With one caption each."""

    def _info(self) -> Any:
        features = {"image": tfds.features.Image(shape=(8, 8, 3)), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count: int) -> Iterator[Any]:
        for index, example in super()._generate_examples(count):
            yield index, {"image": example["image"], "text": f"a square of {index}"}


@pytest.mark.parametrize(
    ("builder", "captions"),
    [("captions", ("a square of {}", "shade {}")), ("text", ("a square of {}",))],
)
def test_captions(builder: str, captions: tuple[str, ...], tmp_path: Path) -> None:
    name = f"scaling_test_{builder}"
    tfds.builder(name, data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    data = Data(name="tfds", builder=name, data_dir=str(tmp_path))
    source = open_source(data, "train")
    assert isinstance(source, Tokenized) and len(source) == 7 and info(data).num_classes == 0
    shades = [int(image[0, 0, 0]) for image in source.source.read(np.arange(7))["image"]]
    expected = [tuple(caption.format(shade) for caption in captions) for shade in shades]
    assert source.source.captions(np.arange(7)) == expected
    first = tokenizer_of(data)([several[0] for several in expected])
    np.testing.assert_array_equal(source.read(np.arange(7))["text"], first["text"])


class ScalingTestFilms(ScalingTestSquares):
    """Video i has 6 + i frames; frame k is of shade 10 i + k. A sequence of images needs no TensorFlow."""

    def _info(self) -> Any:
        frame = tfds.features.Image(shape=(8, 8, 3))
        features = {"video": tfds.features.Sequence(frame), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count: int) -> Iterator[Any]:
        for index in range(count):
            frames = []
            for k in range(6 + index):
                file = io.BytesIO()
                Image.fromarray(np.full((8, 8, 3), 10 * index + k, np.uint8)).save(file, "PNG")
                frames.append(file.getvalue())
            yield index, {"video": frames, "label": index % 3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tfds"))
    for name in ("scaling_test_squares", "scaling_test_films"):
        tfds.builder(name, data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_set_on_disk(prepared: str) -> None:
    data = Data(name="tfds", builder="scaling_test_squares", data_dir=prepared)
    assert info(data).train_examples == 7
    source = open_source(data, "train")
    images, labels = source.read(np.array([5, 0, 6])).values()
    shades = [int(image[0, 0, 0]) for image in images]
    assert [shade % 3 for shade in shades] == labels.tolist()
    assert len(open_source(data, "train[:3]")) == 3
    with pytest.raises(UserError, match=r"split 'test' of scaling_test_squares: .*'train'"):
        open_source(data, "test")
    with pytest.raises(UserError, match=r"split 'train\[:0\]' of scaling_test_squares: "):
        open_source(data, "train[:0]")


def test_no_tensorflow(prepared: str) -> None:
    code = (
        "import sys, numpy as np\n"
        "from scaling.data import Data, open_source\n"
        "for name in ('squares', 'films'):\n"
        f"    data = Data(name='tfds', builder=f'scaling_test_{{name}}', data_dir={prepared!r})\n"
        "    open_source(data, 'train').read(np.array([1, 0]))\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_worker_processes_read_the_same(prepared: str) -> None:
    films = Data(name="tfds", builder="scaling_test_films", data_dir=prepared, batch_size=8)
    data = dataclasses.replace(films, video=Video(frames=3))
    one, other = (
        next(train_batches(dataclasses.replace(data, workers=workers), 0, 0, sharding()))
        for workers in (0, 1)
    )
    np.testing.assert_array_equal(one["image"], other["image"])


def test_videos_on_disk(prepared: str) -> None:
    films = Data(name="tfds", builder="scaling_test_films", data_dir=prepared)
    data = dataclasses.replace(films, batch_size=8, video=Video(frames=3, stride=2))
    assert info(data).image_shape == (3, 8, 8, 3) and info(data).num_classes == 3
    shades = open_views(data, "train", 2, 1).read(np.arange(14))["image"]
    videos = {int(clip[0, 0, 0, 0]) // 10: len(clip) for clip in shades}
    assert videos == dict.fromkeys(range(7), 3)
    for first, last in zip(shades[::2], shades[1::2], strict=True):
        video, start = divmod(int(first[0, 0, 0, 0]), 10)
        assert start == 0 and [int(frame[0, 0, 0]) % 10 for frame in first] == [0, 2, 4]
        assert int(last[-1, 0, 0, 0]) == 10 * video + 5 + video  # the last frame that there is
    assert next(train_batches(data, 0, 0, sharding()))["image"].shape == (8, 3, 8, 8, 3)
    longer = open_source(dataclasses.replace(films, video=Video(frames=4, stride=3)), "train")
    said = (
        r"scaling_test_films: video \d has \d frames, fewer than the 10 of video\.frames=4 at video\.stride=3"
    )
    with pytest.raises(UserError, match=said):
        longer.read(np.arange(7))


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed")
@pytest.mark.parametrize("builder", ["ucf101", "starcraft_video"])
def test_sets_that_tfds_makes_with_tensorflow_alone(builder: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"builder='{builder}': .*may need TensorFlow.*tf extra.*video_folder"
    ) as error:
        info(Data(name="tfds", builder=builder, data_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_set_that_is_not_prepared(tmp_path: Path) -> None:
    data = Data(name="tfds", builder="cifar10", data_dir=str(tmp_path))
    command = f"`tfds build cifar10 --file_format=array_record --data_dir={tmp_path}`"
    with pytest.raises(UserError) as error:
        info(data)
    assert command in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("cifra10", "builder='cifra10': TFDS cannot make it"),
        ("cifar10/none", "builder='cifar10/none': TFDS cannot make it"),
        ("scaling_test_no_label", "feature `label`"),
        ("anli", "feature `image`"),
    ],
)
def test_sets_that_will_not_do(builder: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        info(Data(name="tfds", builder=builder, data_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


def odd_images() -> list[bytes]:
    """[4, 8]: a red left half beside blue, in forms that TFDS itself reads otherwise.

    The last is to be turned by who shows it, which TFDS is not: it stays as it lies.
    """
    plain = np.zeros((4, 8, 3), np.uint8)
    plain[:, :4, 0], plain[:, 4:, 2] = 255, 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    alpha = np.dstack([plain, np.full((4, 8), 255, np.uint8)])
    return [
        png(Image.fromarray(plain)),
        png(Image.fromarray(alpha)),
        png(Image.fromarray(plain).quantize(4)),
        png(Image.fromarray(plain), exif=exif),
    ]


class ScalingTestOdd(ScalingTestSquares):
    """Images of sides that the set leaves open, or says."""

    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in ("open", "said", "grey")]

    def _info(self) -> Any:
        shape = {"open": (None, None, 3), "said": (4, 8, 3), "grey": (None, None, 1)}[
            self.builder_config.name
        ]
        features = {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count: int) -> Iterator[Any]:
        grey = self.builder_config.name == "grey"
        ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
        images = [png(Image.fromarray(ramp))] if grey else odd_images()
        if self.builder_config.name == "said":
            images = [images[0], png(Image.new("RGB", (5, 5))), images[0][:45]]
        for index, image in enumerate(images):
            yield index, {"image": image, "label": 0}


def odd(config: str, folder: Path) -> Any:
    name = f"scaling_test_odd/{config}"
    tfds.builder(name, data_dir=str(folder), file_format="array_record").download_and_prepare()
    crop = {"image_size": 4, "train_transforms": ("center_crop",), "eval_transforms": ("center_crop",)}
    return open_source(Data(name="tfds", builder=name, data_dir=str(folder), **crop), "train")


def test_images_are_as_they_lie_in_their_files(tmp_path: Path) -> None:
    source = odd("open", tmp_path)
    for image in source.read(np.arange(4))["image"]:
        assert image.shape == (4, 8, 3)
        assert image[:, 0].tolist() == [[255, 0, 0]] * 4 and image[:, -1].tolist() == [[0, 0, 255]] * 4
    (ramp,) = odd("grey", tmp_path).read(np.arange(1))["image"]
    assert ramp.shape == (8, 8, 1) and ramp.mean() == pytest.approx(127.5, abs=0.5)


def test_images_that_will_not_do_are_named(tmp_path: Path) -> None:
    source, said = odd("said", tmp_path), []
    for index in range(3):
        try:
            source.read(np.array([index]))
        except UserError as error:
            said.append(str(error).replace(f"example {index}: ", ""))
    shape, broken = sorted(said)
    assert shape == (
        "scaling_test_odd: is an image of (5, 5, 3), and the set says (4, 8, 3); prepare it anew"
    )
    assert broken.startswith("scaling_test_odd: is not a readable image (") and "\n" not in broken


def test_a_split_without_labels_is_named() -> None:
    said = "imagenet2012: example 0 has label -1, which stands for none: this split has no labels"
    with tfds.testing.mock_data(as_data_source_fn=mocked):
        batches = eval_batches(IMAGENET, "test", 8, sharding())
        with pytest.raises(UserError, match=said):
            next(batches)
        unlabelled = dataclasses.replace(IMAGENET, train_split="test")
        with pytest.raises(UserError, match=r"imagenet2012: example \d+ has label -1"):
            next(train_batches(unlabelled, 0, 0, sharding()))


def test_the_video_without_a_label_is_named_and_not_its_view() -> None:
    def films(builder: Any, split: str, **options: Any) -> list[dict[str, Any]]:
        frames = [png(Image.new("RGB", (8, 8)))] * 6
        return [{"video": frames, "label": label} for label in (0, 1, 3, 2)]

    data = Data(name="tfds", builder="scaling_test_films", batch_size=8, video=Video(frames=2, shuffle=True))
    with tfds.testing.mock_data(as_data_source_fn=films):
        batches = view_batches(data, "train", (4, 1), 16, sharding())
        said = "scaling_test_films: example 2 has label 3, and its classes are 0 to 2; mend the labels"
        with pytest.raises(UserError, match=said):
            next(batches)
