"""Any TFDS set with an `image` and a `label`, read without TensorFlow from array_record files."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.data.sources import Columns
from scaling.errors import UserError

if TYPE_CHECKING:
    from scaling.data.options import Data


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


def tfds_set(data: "Data", split: str) -> TfdsSource:
    """The set `data.builder`; `split` is any of TFDS's names, slices such as "train[:10%]" included."""
    import tensorflow_datasets as tfds  # half a second; imports no TensorFlow

    try:
        builder = tfds.builder(data.builder, data_dir=data.data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"builder={data.builder!r}: TFDS cannot make it ({reason})") from None
    num_classes, shape = _features(data.builder, builder.info.features, tfds)
    try:
        records = builder.as_data_source(split)
    except NotImplementedError:  # what TFDS says both of a missing set and of one kept as tfrecord
        place = f" --data_dir={data.data_dir}" if data.data_dir else ""
        raise UserError(
            f"builder={data.builder!r}: no array_record files in {builder.data_dir}; prepare them with "
            f"`tfds build {data.builder} --file_format=array_record{place}` (needs the package's tf extra)"
        ) from None
    except ValueError as error:
        raise UserError(f"split {split!r} of {data.builder}: {str(error).splitlines()[0]}") from None
    return TfdsSource(builder.name, num_classes, shape, records)


def _features(name: str, features: Any, tfds: Any) -> tuple[int, tuple[int | None, int | None, int]]:
    """(number of classes, [H, W, C] with None for what varies), or a UserError for a set of another kind."""
    known = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = known.get("image"), known.get("label")
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise UserError(f"builder={name!r}: needs a set with a feature `image` of uint8 pixels")
    if not isinstance(label, tfds.features.ClassLabel) or label.num_classes is None:
        raise UserError(f"builder={name!r}: needs a set with a feature `label` of known classes")
    height, width, channels = image.shape
    return label.num_classes, (height, width, channels)
