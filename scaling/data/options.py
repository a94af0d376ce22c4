"""The `data` section of a config, and what is known of a data set before any example is read."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from scaling.data import (
    latents,
    moving,
    openmoji,
    openmoji_questions,
    pair_files,
    sources,
    tfds_source,
    video_folder,
)
from scaling.data.latents import Latents, LatentSource
from scaling.data.pairs import Pairs, Tokenized, all_captions
from scaling.data.sources import Source
from scaling.data.text import Text, TextInfo, Tokenizer, tokenizer
from scaling.data.transforms import TRANSFORMS, named
from scaling.data.video import Clips, Sampled, Shuffled, Video, Views, check_views
from scaling.errors import UserError


@dataclass(frozen=True)
class Data:
    """Which examples, in what batches, and how they are read.

    The order of training examples and their augmentation depend on the run's seed, which is not part of
    the data: it is passed to `train_batches`.
    """

    name: str = "mnist"  # a key of DATASETS
    builder: str = ""  # tfds: name of the set, "cifar10" or "name/config:version"
    data_dir: str | None = None  # folder of the set (None: the usual one); npz: the file
    batch_size: int = 64  # examples of one step, over all devices and hosts
    train_split: str = "train"
    image_size: int | None = None  # side that the cropping transforms give, in pixels
    augment: tuple[str, ...] = ()  # transforms of training images, in order
    eval_transforms: tuple[str, ...] = ()  # the same for evaluation: nothing random
    text: Text = field(default_factory=Text)  # of sets with captions: how they become tokens
    video: Video = field(default_factory=Video)  # of videos: how clips are taken
    unreadable: Literal["fail", "skip"] = "fail"  # files that cannot be read stop the run, or are left out
    threads: int = 2  # that read, in each process
    workers: int = 0  # processes that read training batches; 0 reads in the run's own
    prefetch: int = 2  # batches kept ready, on the host and again on the devices

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise UserError(f"name={self.name!r}: not a data set; choose from {', '.join(DATASETS)}")
        if self.name == "tfds" and not self.builder:
            raise UserError("builder='': name='tfds' needs the set's name, for example builder='cifar10'")
        if self.name != "tfds" and self.builder:
            raise UserError(f"builder={self.builder!r}: only read with name='tfds', not name={self.name!r}")
        if self.data_dir is None and self.name in NEEDS:
            raise UserError(f"data_dir=None: name={self.name!r} needs {NEEDS[self.name]}")
        if self.data_dir is not None and self.name not in FOLDERS:
            raise UserError(f"data_dir={self.data_dir!r}: {self.name} comes with a package; leave it out")
        if self.unreadable != "fail" and self.name not in ("pairs", "video_folder"):
            raise UserError(f"unreadable={self.unreadable!r}: only read with name='pairs' or 'video_folder'")
        if self.name.startswith("moving_") and "flip" in self.augment:
            raise UserError(f"augment={self.augment!r}: 'flip' turns the motions of {self.name} around")
        for key in ("image_size", "augment", "eval_transforms"):
            if self.name == "latents" and getattr(self, key):
                raise UserError(f"{key}={getattr(self, key)!r}: latents were encoded with it; leave it out")
        for key, least in (("batch_size", 1), ("threads", 1), ("workers", 0), ("prefetch", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key}={getattr(self, key)}: must be at least {least}")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size={self.image_size}: must be at least 1, or None to keep the size")
        self._check_transforms("augment", self.augment)
        self._check_transforms("eval_transforms", self.eval_transforms)
        for name in self.eval_transforms:
            if named(name).random:
                fixed = ", ".join(key for key, value in TRANSFORMS.items() if not value.random)
                raise UserError(f"eval_transforms: {name!r} is random; evaluation may use {fixed}")

    def _check_transforms(self, field: str, names: tuple[str, ...]) -> None:
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
        if self.name in DRAWN and self.image_size is None:
            raise UserError(f"image_size=None: {self.name} is drawn at any size; give the side in pixels")
        if self.image_size is not None and not sized and self.name not in DRAWN:
            crops = ", ".join(key for key, value in TRANSFORMS.items() if value.sized)
            raise UserError(f"image_size={self.image_size}: {field} needs a transform that crops: {crops}")


@dataclass(frozen=True)
class Info:
    """What a model needs to know of its data."""

    name: str  # "mnist", or the builder's name for a TFDS set
    num_classes: int  # 0: no labels
    image_shape: tuple[int, ...]  # [H, W, C] of a batch's images, after cropping; of videos [T, H, W, C]
    train_examples: int
    latents: Latents | None = None  # what a batch's images are instead of pixels
    text: TextInfo | None = None  # of captions
    factors: dict[str, int] = field(default_factory=dict)  # whose product the classes are, the last fastest

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Of a batch, the shape of one example and the type: "image", and what else the data have."""
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "image": (self.image_shape, "uint8" if self.latents is None else "float32")
        }
        if self.num_classes:
            found["label"] = ((), "int32")
        if self.text is not None:
            types = {"text": "int32", "text_mask": "bool", "text_word": "int32"}
            found |= {name: ((self.text.length,), dtype) for name, dtype in types.items()}
        return found


DATASETS: dict[str, Callable[[Data, str], Source]] = {
    "digits": sources.digits,
    "mnist": sources.mnist,
    "fashion_mnist": sources.fashion_mnist,
    "npz": sources.npz,
    "tfds": tfds_source.tfds_set,
    "latents": latents.latents,
    "pairs": pair_files.pair_files,
    "openmoji": openmoji.openmoji,
    "openmoji_tones": openmoji.openmoji_tones,
    "openmoji_answers": openmoji_questions.openmoji_answers,
    "openmoji_both": openmoji_questions.openmoji_both,
    "moving_mnist": moving.moving_mnist,
    "moving_fashion_mnist": moving.moving_fashion_mnist,
    "video_folder": video_folder.video_folder,
}
DRAWN = tuple(name for name in DATASETS if name.startswith("openmoji"))  # at image_size, not cropped to it
NEEDS = {  # of data_dir: sets without one
    "npz": "the file, for example data_dir='birds.npz'",
    "pairs": "the folder with a folder for each split",
    "latents": "the folder that `scaling encode` made",
    "video_folder": "the folder of SPLIT/CLASS/*.mp4",
}
FOLDERS = ("tfds", "fashion_mnist", "moving_fashion_mnist", *NEEDS)  # may have a data_dir


def open_source(data: Data, split: str) -> Source:
    """The examples of one split, by index. Raises UserError when they are not there."""
    source = DATASETS[data.name](data, split)
    if isinstance(source, Pairs):
        return Tokenized(source, tokenizer_of(data))
    if isinstance(source, Clips):
        source = Sampled(source)
    if data.video.shuffle and len(source.image_shape) != 4:
        raise UserError(f"video.shuffle=True: {source.name} holds images, which have no frames to shuffle")
    return Shuffled(source) if data.video.shuffle else source


def open_views(data: Data, split: str, temporal: int, spatial: int) -> Source:
    """Every example of a split as `temporal` x `spatial` clips, cropped as evaluation does (`Views`).

    Raises: UserError where the data are no videos, or do not have these views.
    """
    source = DATASETS[data.name](data, split)
    check_views(data, source, temporal, spatial)
    views = Views(source, data, temporal, spatial)
    return Shuffled(views) if data.video.shuffle else views


@functools.lru_cache(maxsize=4)
def tokenizer_of(data: Data) -> Tokenizer:
    """Of a set with captions: the one that is named, or learned from the training split."""

    unread: list[UserError] = []  # of the captions, and not of `data.text`

    def captions() -> Iterator[str]:
        try:
            source = DATASETS[data.name](data, data.train_split)
            assert isinstance(source, Pairs)
            yield from all_captions(source)
        except UserError as e:
            unread.append(e)
            raise

    try:
        return tokenizer(data.text, captions)
    except UserError as e:
        raise (e if e in unread else UserError(f"text.{e}")) from None


def image_shape(data: Data, source: Source) -> tuple[int, ...]:
    """[H, W, C] of every image that a batch holds (of videos [T, H, W, C]).

    Raises: UserError for images of many sizes.
    """
    *frames, height, width, channels = source.image_shape
    if data.image_size is not None:
        height = width = data.image_size
    known = tuple(side for side in (*frames, height, width, channels) if side is not None)
    if len(known) < len(source.image_shape):
        raise UserError(
            f"image_size=None: images of {source.name} differ in size; set image_size, and a crop in augment "
            "and eval_transforms"
        )
    return known


def info(data: Data) -> Info:
    """Classes, image shape and number of training examples; reads no image of a set on disk."""
    source = open_source(data, data.train_split)
    plain = source.source if isinstance(source, Shuffled) else source
    factors = dict(plain.factors) if isinstance(plain, moving.Moving) else {}
    encoded = source.latents if isinstance(source, LatentSource) else None
    words = source.tokenizer.info if isinstance(source, Tokenized) else None
    return Info(
        source.name, source.num_classes, image_shape(data, source), len(source), encoded, words, factors
    )
