"""The `data` section of a config, the table of data sets, and their properties before any example is read."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from scaling.data.pairs import Pairs, Tokenized, all_captions
from scaling.data.sources import arrays, latents, openmoji, openmoji_questions
from scaling.data.sources.base import ArraySource, Source
from scaling.data.sources.latents import Latents, LatentSource
from scaling.data.sources.moving import Moving
from scaling.data.sources.pair_files import pair_files
from scaling.data.sources.tfds import tfds_set
from scaling.data.sources.video_folder import video_folder
from scaling.data.text import Text, TextInfo, Tokenizer, tokenizer
from scaling.data.transforms import TRANSFORMS, named
from scaling.data.video import Clips, ClipViews, Sampled, Shuffled, Video, check_views
from scaling.errors import UserError
from scaling.validation import in_section


@dataclass(frozen=True)
class Data:
    """The `data` section: which examples, in what batches, and how they are read.

    The order of training examples and their random transforms depend on the run's seed, which is not part of
    this section; it is passed to `train_batches`.
    """

    name: str = "mnist"  # a key of DATASETS
    builder: str = ""  # tfds: name of the set, such as "cifar10" or "name/config:version"
    data_dir: str | None = None  # folder of the set, or the file of npz; None: the usual folder
    batch_size: int = 64  # examples per step, over all devices and hosts
    train_split: str = "train"
    image_size: int | None = None  # side of the cropping transforms' images, in pixels
    train_transforms: tuple[str, ...] = ()  # names of the transforms of training images, in order
    eval_transforms: tuple[str, ...] = ()  # names of the transforms of evaluation images: none random
    text: Text = field(default_factory=Text)  # tokenisation of captions, for sets that have them
    video: Video = field(default_factory=Video)  # selection of clips, for sets of videos
    unreadable: Literal["fail", "skip"] = "fail"  # treatment of files that cannot be read
    threads: int = 2  # reading threads per process
    workers: int = 0  # processes that read training batches; 0: the run's own process reads
    prefetch: int = 2  # batches kept ready on the host, and as many on the devices

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise UserError(f"name={self.name!r}: not a data set; choose from {', '.join(DATASETS)}")
        if self.name == "tfds" and not self.builder:
            raise UserError("builder='': name='tfds' needs the set's name, for example builder='cifar10'")
        if self.name != "tfds" and self.builder:
            raise UserError(f"builder={self.builder!r}: only read with name='tfds', not name={self.name!r}")
        dataset = DATASETS[self.name]
        if self.data_dir is None and dataset.folder is not None:
            raise UserError(f"data_dir=None: name={self.name!r} needs {dataset.folder}")
        if self.data_dir is not None and not self.data_dir.strip():
            raise UserError(f"data_dir={self.data_dir!r}: must be a path; give the current folder as '.'")
        if self.data_dir is not None and not dataset.takes_folder:
            raise UserError(f"data_dir={self.data_dir!r}: {self.name} comes with a package; leave it out")
        if self.unreadable != "fail" and not dataset.skips:
            skips = " or ".join(repr(name) for name, entry in DATASETS.items() if entry.skips)
            raise UserError(f"unreadable={self.unreadable!r}: only read with name={skips}")
        if not dataset.mirrors and "flip" in self.train_transforms:
            raise UserError(
                f"train_transforms={self.train_transforms!r}: 'flip' turns the motions of {self.name} around"
            )
        for key in ("image_size", "train_transforms", "eval_transforms"):
            if self.name == "latents" and getattr(self, key):
                raise UserError(f"{key}={getattr(self, key)!r}: latents were encoded with it; leave it out")
        for key, minimum in (("batch_size", 1), ("threads", 1), ("workers", 0), ("prefetch", 1)):
            if getattr(self, key) < minimum:
                raise UserError(f"{key}={getattr(self, key)}: must be at least {minimum}")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size={self.image_size}: must be at least 1, or None to keep the size")
        self._check_transforms("train_transforms", self.train_transforms)
        self._check_transforms("eval_transforms", self.eval_transforms)
        for name in self.eval_transforms:
            if named(name).random:
                fixed = ", ".join(key for key, value in TRANSFORMS.items() if not value.random)
                raise UserError(f"eval_transforms: {name!r} is random; evaluation may use {fixed}")

    @property
    def side(self) -> int:
        """The side in pixels that images are cropped or drawn to; 0 if they keep their size."""
        return self.image_size or 0

    def _check_transforms(self, field: str, names: tuple[str, ...]) -> None:
        """Checks that the transforms of a field exist and agree with `image_size`."""
        try:
            sized = [name for name in names if named(name).sized]
        except UserError as e:
            raise UserError(f"{field}: {e}") from None
        if sized and self.image_size is None:
            raise UserError(f"image_size=None: {sized[0]!r} in {field} needs the side to crop to, in pixels")
        for name in sized:
            short = named(name).options().get("short", 1.0)
            if self.image_size is not None and 1.0 < short < self.image_size:
                raise UserError(
                    f"image_size={self.image_size}: {name!r} in {field} cuts it out of a short side of "
                    f"{short:g}; give that as a share, such as {name.partition('(')[0]}(0.875)"
                )
        drawn_to_size = DATASETS[self.name].drawn_to_size
        if drawn_to_size and self.image_size is None:
            raise UserError(f"image_size=None: {self.name} is drawn at any size; give the side in pixels")
        if self.image_size is not None and not sized and not drawn_to_size:
            crops = ", ".join(key for key, value in TRANSFORMS.items() if value.sized)
            raise UserError(f"image_size={self.image_size}: {field} needs a transform that crops: {crops}")


@dataclass(frozen=True)
class Dataset:
    """A named data set: how it is opened, and which keys of the `data` section it reads."""

    open: "Callable[[Data, str], Source]"  # (data, split) -> examples of the split
    folder: str | None = None  # description of the data_dir that is needed, for the error if it is left out
    reads_folder: bool = False  # whether data_dir may be given, though it need not
    drawn_to_size: bool = False  # whether images are drawn at image_size, not cropped to it
    mirrors: bool = True  # whether a mirrored image keeps its label
    skips: bool = False  # whether unreadable="skip" is supported

    @property
    def takes_folder(self) -> bool:
        """Whether data_dir may be given."""
        return self.reads_folder or self.folder is not None


def _open_moving(open_images: "Callable[[Data, str], Source]") -> "Callable[[Data, str], Source]":
    """Returns a function that opens clips in which the images of another set move."""

    def open_clips(data: "Data", split: str) -> Source:
        source = open_images(data, split)
        assert isinstance(source, ArraySource)
        return Moving(source, data.video.frames, data.video.stride)

    return open_clips


def _data_dir(data: "Data") -> Path:
    return Path(str(data.data_dir))  # `Data` has checked that it is given


def _open_fashion_mnist(data: "Data", split: str) -> Source:
    return arrays.fashion_mnist(None if data.data_dir is None else _data_dir(data), split)


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(lambda data, split: arrays.digits(split)),
    "mnist": Dataset(lambda data, split: arrays.mnist(split)),
    "fashion_mnist": Dataset(_open_fashion_mnist, reads_folder=True),
    "npz": Dataset(
        lambda data, split: arrays.npz(_data_dir(data), split),
        folder="the file, for example data_dir='birds.npz'",
    ),
    "tfds": Dataset(
        lambda data, split: tfds_set(data.builder, data.data_dir, split, data.video), reads_folder=True
    ),
    "latents": Dataset(
        lambda data, split: latents.latents(_data_dir(data), split),
        folder="the folder that `scaling encode` made",
    ),
    "pairs": Dataset(
        lambda data, split: pair_files(_data_dir(data), split, data.unreadable == "skip", data.threads),
        folder="the folder with a folder for each split",
        skips=True,
    ),
    "openmoji": Dataset(lambda data, split: openmoji.openmoji(data.side, split), drawn_to_size=True),
    "openmoji_tones": Dataset(
        lambda data, split: openmoji.openmoji_tones(data.side, split), drawn_to_size=True
    ),
    "openmoji_answers": Dataset(
        lambda data, split: openmoji_questions.openmoji_answers(data.side, split), drawn_to_size=True
    ),
    "openmoji_both": Dataset(
        lambda data, split: openmoji_questions.openmoji_both(data.side, split), drawn_to_size=True
    ),
    "moving_mnist": Dataset(_open_moving(lambda data, split: arrays.mnist(split)), mirrors=False),
    "moving_fashion_mnist": Dataset(_open_moving(_open_fashion_mnist), reads_folder=True, mirrors=False),
    "video_folder": Dataset(
        lambda data, split: video_folder(
            _data_dir(data), split, data.train_split, data.video, data.unreadable == "skip", data.threads
        ),
        folder="the folder of SPLIT/CLASS/*.mp4",
        skips=True,
    ),
}


@dataclass(frozen=True)
class Info:
    """Properties of a data set that a model needs to know."""

    name: str  # "mnist", or the builder's name for a TFDS set
    num_classes: int  # number of classes; 0: no labels
    image_shape: tuple[int, ...]  # [H, W, C] of a batch's images, after cropping; [T, H, W, C] of videos
    train_examples: int
    latents: Latents | None = None  # description of the latents, if a batch has these instead of pixels
    text: TextInfo | None = None  # properties of the tokenised captions
    # Numbers of values of a label's factors, whose product is num_classes; the last factor varies fastest.
    factors: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.image_shape, default=0) < 1:
            raise UserError(f"image_shape={self.image_shape}: must be sides of at least 1")
        for key in ("num_classes", "train_examples"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)}: must be at least 0")

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The columns of a batch, "image" among them, each with the shape of one example and the type."""
        columns: dict[str, tuple[tuple[int, ...], str]] = {
            "image": (self.image_shape, "uint8" if self.latents is None else "float32")
        }
        if self.num_classes:
            columns["label"] = ((), "int32")
        if self.text is not None:
            types = {"text": "int32", "text_mask": "bool", "text_word": "int32"}
            columns |= {name: ((self.text.length,), dtype) for name, dtype in types.items()}
        return columns


def open_source(data: Data, split: str) -> Source:
    """Returns the examples of one split, by index.

    Raises:
        UserError: if they are missing, or `video.shuffle` is set for images.
    """
    source = DATASETS[data.name].open(data, split)
    if isinstance(source, Pairs):
        return Tokenized(source, tokenizer_of(data))
    if isinstance(source, Clips):
        source = Sampled(source)
    if data.video.shuffle and len(source.image_shape) != 4:
        raise UserError(
            f"data.video.shuffle=True: {source.name} holds images, which have no frames to shuffle"
        )
    return Shuffled(source) if data.video.shuffle else source


def open_views(data: Data, split: str, num_clips: int, num_crops: int) -> Source:
    """Returns a split with `num_clips` x `num_crops` views of every example, cropped as in evaluation.

    Raises:
        UserError: if the data are not videos, or do not have these views.
    """
    source = DATASETS[data.name].open(data, split)
    check_views(source, num_clips, num_crops, data.eval_transforms)
    views = ClipViews(source, num_clips, num_crops, data.image_size, data.eval_transforms)
    return Shuffled(views) if data.video.shuffle else views


@functools.lru_cache(maxsize=4)
def tokenizer_of(data: Data) -> Tokenizer:
    """Returns the tokenizer of a set with captions: of `text.vocab_file`, or learned from the training split.

    Raises:
        UserError: if the vocabulary or the captions cannot be read.
    """

    def captions() -> Iterator[str]:
        source = DATASETS[data.name].open(data, data.train_split)
        assert isinstance(source, Pairs)
        yield from all_captions(source)

    try:
        return tokenizer(data.text, captions)
    except UserError as e:  # of the options, or of a caption
        raise in_section("data.text", e, (f.name for f in fields(Text))) from None


def image_shape(data: Data, source: Source) -> tuple[int, ...]:
    """Returns [H, W, C] of every image in a batch, or [T, H, W, C] of every video.

    Raises:
        UserError: if the images differ in size and are not cropped.
    """
    *frames, height, width, channels = source.image_shape
    if data.image_size is not None:
        height = width = data.image_size
    shape = tuple(side for side in (*frames, height, width, channels) if side is not None)
    if len(shape) < len(source.image_shape):
        raise UserError(
            f"data.image_size=None: images of {source.name} differ in size; set it, and a crop in "
            "data.train_transforms and data.eval_transforms"
        )
    return shape


def info(data: Data) -> Info:
    """Returns a data set's classes, image shape, number of training examples and so on.

    No image of a set on disk is read.

    Raises:
        UserError: if the examples are missing, or there are none.
    """
    try:
        source = open_source(data, data.train_split)
    except UserError as e:
        if not str(e).startswith("split "):
            raise
        raise UserError(f"data.train_split={data.train_split!r}: {e}") from None
    if not len(source):
        raise UserError(f"data.train_split={data.train_split!r}: {source.name} has no example in it")
    in_order = source.source if isinstance(source, Shuffled) else source
    return Info(
        name=source.name,
        num_classes=source.num_classes,
        image_shape=image_shape(data, source),
        train_examples=len(source),
        latents=source.latents if isinstance(source, LatentSource) else None,
        text=source.tokenizer.info if isinstance(source, Tokenized) else None,
        factors=dict(in_order.factors) if isinstance(in_order, Moving) else {},
    )
