"""Any TFDS set of images with labels or captions, read without TensorFlow from array_record files."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.data.sources import Columns
from scaling.errors import UserError

if TYPE_CHECKING:
    from scaling.data.options import Data


CAPTIONS = ("captions", "caption", "text")


@dataclass(frozen=True)
class TfdsSource:
    """A split of a prepared TFDS set; images are decoded when they are read."""

    name: str
    num_classes: int
    image_shape: tuple[int | None, int | None, int]
    records: Any  # tfds.data_source: a random-access sequence of feature dicts

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> Columns:
        examples = [self.records[index] for index in indices.tolist()]
        labels = np.array([example["label"] for example in examples], np.int32)
        return {"image": [example["image"] for example in examples], "label": labels}


@dataclass(frozen=True)
class TfdsPairs:
    """A split of a prepared TFDS set with captions."""

    name: str
    image_shape: tuple[int | None, int | None, int]
    records: Any
    texts: Any  # the same, where images are not decoded
    key: str  # of the captions
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> Columns:
        return {"image": [self.records[index]["image"] for index in indices.tolist()]}

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return [_texts(self.texts[index][self.key]) for index in indices.tolist()]


def _texts(found: Any) -> tuple[str, ...]:
    """One caption, or several, or several with their numbers (as of coco_captions)."""
    several = found["text"] if isinstance(found, dict) else [found] if isinstance(found, bytes) else found
    return tuple(text.decode("utf-8") for text in several)


def tfds_set(data: "Data", split: str) -> TfdsSource | TfdsPairs:
    """The set `data.builder`; `split` is any of TFDS's names, slices such as "train[:10%]" included.

    Its other feature is `label`, or else captions by a name in `CAPTIONS`.
    """
    import tensorflow_datasets as tfds  # half a second; imports no TensorFlow

    try:
        builder = tfds.builder(data.builder, data_dir=data.data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"builder={data.builder!r}: TFDS cannot make it ({reason})") from None
    known = (
        dict(builder.info.features) if isinstance(builder.info.features, tfds.features.FeaturesDict) else {}
    )
    shape, kind = _image_shape(data.builder, known, tfds), known.get("label")
    key = next((key for key in CAPTIONS if key in known), None)
    if isinstance(kind, tfds.features.ClassLabel) and kind.num_classes is not None:
        return TfdsSource(builder.name, kind.num_classes, shape, _records(data, split, builder))
    if key is not None:
        skip = {"image": tfds.decode.SkipDecoding()}
        both = (_records(data, split, builder), _records(data, split, builder, decoders=skip))
        return TfdsPairs(builder.name, shape, *both, key)
    raise UserError(
        f"builder={data.builder!r}: needs a set with a feature `label` of known classes, or captions "
        f"({', '.join(CAPTIONS)})"
    )


def _records(data: "Data", split: str, builder: Any, **options: Any) -> Any:
    try:
        return builder.as_data_source(split, **options)
    except NotImplementedError:  # what TFDS says both of a missing set and of one kept as tfrecord
        place = f" --data_dir={data.data_dir}" if data.data_dir else ""
        raise UserError(
            f"builder={data.builder!r}: no array_record files in {builder.data_dir}; prepare them with "
            f"`tfds build {data.builder} --file_format=array_record{place}` (needs the package's tf extra)"
        ) from None
    except ValueError as error:
        raise UserError(f"split {split!r} of {data.builder}: {str(error).splitlines()[0]}") from None


def _image_shape(name: str, known: dict[str, Any], tfds: Any) -> tuple[int | None, int | None, int]:
    """[H, W, C] with None for what varies, or a UserError for a set of another kind."""
    image = known.get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise UserError(f"builder={name!r}: needs a set with a feature `image` of uint8 pixels")
    height, width, channels = image.shape
    return height, width, channels
