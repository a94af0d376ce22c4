"""The `data` section of a config, and what is known of a data set before any example is read."""

from collections.abc import Callable
from dataclasses import dataclass

from scaling.data import latents, sources, tfds_source
from scaling.data.latents import Latents, LatentSource
from scaling.data.sources import Source
from scaling.data.transforms import TRANSFORMS
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
        if self.data_dir is None and self.name == "npz":
            raise UserError("data_dir=None: name='npz' needs the file, for example data_dir='birds.npz'")
        if self.data_dir is None and self.name == "latents":
            raise UserError("data_dir=None: name='latents' needs the folder that `scaling encode` made")
        if self.data_dir is not None and self.name not in ("tfds", "fashion_mnist", "npz", "latents"):
            raise UserError(f"data_dir={self.data_dir!r}: {self.name} comes with a package; leave it out")
        for field in ("image_size", "augment", "eval_transforms"):
            if self.name == "latents" and getattr(self, field):
                raise UserError(
                    f"{field}={getattr(self, field)!r}: latents were encoded with it; leave it out"
                )
        for field, least in (("batch_size", 1), ("threads", 1), ("workers", 0), ("prefetch", 1)):
            if getattr(self, field) < least:
                raise UserError(f"{field}={getattr(self, field)}: must be at least {least}")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size={self.image_size}: must be at least 1, or None to keep the size")
        self._check_transforms("augment", self.augment)
        self._check_transforms("eval_transforms", self.eval_transforms)
        for name in self.eval_transforms:
            if TRANSFORMS[name].random:
                fixed = ", ".join(key for key, value in TRANSFORMS.items() if not value.random)
                raise UserError(f"eval_transforms: {name!r} is random; evaluation may use {fixed}")

    def _check_transforms(self, field: str, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in TRANSFORMS:
                raise UserError(f"{field}: {name!r} is not a transform; choose from {', '.join(TRANSFORMS)}")
        sized = [name for name in names if TRANSFORMS[name].sized]
        if sized and self.image_size is None:
            raise UserError(f"image_size=None: {sized[0]!r} in {field} needs the side to crop to, in pixels")
        if self.image_size is not None and not sized:
            crops = ", ".join(key for key, value in TRANSFORMS.items() if value.sized)
            raise UserError(f"image_size={self.image_size}: {field} needs a transform that crops: {crops}")


@dataclass(frozen=True)
class Info:
    """What a model needs to know of its data."""

    name: str  # "mnist", or the builder's name for a TFDS set
    num_classes: int
    image_shape: tuple[int, ...]  # [H, W, C] of a batch's images, after cropping; of videos [T, H, W, C]
    train_examples: int
    latents: Latents | None = None  # what a batch's images are instead of pixels

    @property
    def dtype(self) -> str:
        """Of a batch's images."""
        return "uint8" if self.latents is None else "float32"


DATASETS: dict[str, Callable[[Data, str], Source]] = {
    "digits": sources.digits,
    "mnist": sources.mnist,
    "fashion_mnist": sources.fashion_mnist,
    "npz": sources.npz,
    "tfds": tfds_source.tfds_set,
    "latents": latents.latents,
}


def open_source(data: Data, split: str) -> Source:
    """The examples of one split, by index. Raises UserError when they are not there."""
    return DATASETS[data.name](data, split)


def image_shape(data: Data, source: Source) -> tuple[int, int, int]:
    """[H, W, C] of every image that a batch holds. Raises UserError for images of many sizes."""
    height, width, channels = source.image_shape
    if data.image_size is not None:
        return data.image_size, data.image_size, channels
    if height is None or width is None:
        raise UserError(
            f"image_size=None: images of {source.name} differ in size; set image_size, and a crop in augment "
            "and eval_transforms"
        )
    return height, width, channels


def info(data: Data) -> Info:
    """Classes, image shape and number of training examples; reads no image of a set on disk."""
    source = open_source(data, data.train_split)
    encoded = source.latents if isinstance(source, LatentSource) else None
    return Info(source.name, source.num_classes, image_shape(data, source), len(source), encoded)
