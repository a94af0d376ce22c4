"""Any TFDS set of images or videos with labels, or of images with captions, read without TensorFlow.

TFDS itself makes its feature `Video` only where TensorFlow is installed; a `video` that is declared as a
sequence of images needs none.

Images are decoded here and not by TFDS. Without TensorFlow it would hand out the indices of a palette as a
picture, the low bytes of 16 bits, and four channels for a picture with transparency. They are not turned
upright: neither TFDS nor torchvision does so, and ImageNet's published figures are of pixels as they lie.
"""

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.data.decoding import MODES, decode_image
from scaling.data.sources import Columns
from scaling.data.video import Video, begin
from scaling.errors import UserError

if TYPE_CHECKING:
    from scaling.data.options import Data


CAPTIONS = ("captions", "caption", "text")


class Encoded:
    """A decoder for TFDS that leaves an image, or each of a sequence of images, as the bytes of its file.

    As `tfds.decode.SkipDecoding`, which cannot be used on sequences.
    """

    def setup(self, *, feature: Any) -> None:
        """Does nothing: what the feature would make of the bytes does not matter."""

    def decode_example_np(self, raw: Any) -> Any:
        return raw

    decode_batch_example_np = decode_example_np


def _decoded(raw: bytes, shape: tuple[int | None, int | None, int], where: str) -> np.ndarray:
    """Returns the image uint8 [H, W, C].

    Raises: UserError, beginning with `where`, for what is no image, or one of other sides than the set says.
    """
    try:
        image = decode_image(raw, shape[2], upright=False)
    except ValueError as e:
        raise UserError(f"{where}: is not a readable image ({e}); prepare the set anew") from None
    if any(side not in (None, found) for side, found in zip(shape, image.shape, strict=True)):
        raise UserError(f"{where}: is an image of {image.shape}, and the set says {shape}; prepare it anew")
    return image


@dataclass(frozen=True)
class TfdsSource:
    """A split of a prepared TFDS set; images are decoded when they are read."""

    name: str
    num_classes: int
    image_shape: tuple[int | None, int | None, int]
    records: Any  # tfds.data_source: a random-access sequence of feature dicts, with images `Encoded`

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> Columns:
        images, labels = [], []
        for index in indices.tolist():
            example = self.records[index]
            images.append(_decoded(example["image"], self.image_shape, f"{self.name}: example {index}"))
            labels.append(example["label"])
        return {"image": images, "label": np.array(labels, np.int32)}


@dataclass(frozen=True)
class TfdsVideos:
    """A split of a prepared TFDS set of videos; the frames of a clip are decoded when it is read."""

    name: str
    num_classes: int
    frame_shape: tuple[int | None, int | None, int]
    records: Any  # as those of `TfdsSource`
    video: Video

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        return (self.video.frames, *self.frame_shape)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> Columns:
        return self.at(indices, np.full(len(indices), 0.5))

    def at(self, indices: np.ndarray, places: np.ndarray) -> Columns:
        clips, labels = [], []
        for index, place in zip(indices.tolist(), places.tolist(), strict=True):
            example = self.records[index]
            frames, span = example["video"], self.video.span
            if len(frames) < span:
                raise UserError(
                    f"{self.name}: video {index} has {len(frames)} frames, fewer than the {span} of "
                    f"video.frames={self.video.frames} at video.stride={self.video.stride}; lower these"
                )
            first = begin(place, len(frames), span)
            wanted, where = frames[first : first + span : self.video.stride], f"{self.name}: video {index}"
            clips.append(np.stack([_decoded(raw, self.frame_shape, where) for raw in wanted]))
            labels.append(example["label"])
        return {"image": clips, "label": np.array(labels, np.int32)}


@dataclass(frozen=True)
class TfdsPairs:
    """A split of a prepared TFDS set with captions."""

    name: str
    image_shape: tuple[int | None, int | None, int]
    records: Any  # as those of `TfdsSource`
    key: str  # of the captions
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> Columns:
        found = [(index, self.records[index]["image"]) for index in indices.tolist()]
        images = [_decoded(raw, self.image_shape, f"{self.name}: example {i}") for i, raw in found]
        return {"image": images}

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return [_texts(self.records[index][self.key]) for index in indices.tolist()]


def _texts(found: Any) -> tuple[str, ...]:
    """One caption, or several, or several with their numbers (as of coco_captions)."""
    several = found["text"] if isinstance(found, dict) else [found] if isinstance(found, bytes) else found
    return tuple(text.decode("utf-8") for text in several)


def tfds_set(data: "Data", split: str) -> TfdsSource | TfdsVideos | TfdsPairs:
    """The set `data.builder`; `split` is any of TFDS's names, slices such as "train[:10%]" included.

    Its other feature is `label`, or else captions by a name in `CAPTIONS`.
    """
    import tensorflow_datasets as tfds  # half a second; imports no TensorFlow

    try:
        builder = tfds.builder(data.builder, data_dir=data.data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, ModuleNotFoundError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"builder={data.builder!r}: TFDS cannot make it ({reason}){_advice(error)}") from None
    features = builder.info.features
    known = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    shape, label = _image_shape(data.builder, known, tfds), known.get("label")
    key = next((key for key in CAPTIONS if key in known), None)
    seen = "video" if "video" in known else "image"
    if isinstance(label, tfds.features.ClassLabel) and label.num_classes is not None:
        records = _records(data, split, builder, seen)
        if seen == "video":
            return TfdsVideos(builder.name, label.num_classes, shape, records, data.video)
        return TfdsSource(builder.name, label.num_classes, shape, records)
    if key is not None:
        return TfdsPairs(builder.name, shape, _records(data, split, builder, seen), key)
    raise UserError(
        f"builder={data.builder!r}: needs a set with a feature `label` of known classes, or captions "
        f"({', '.join(CAPTIONS)})"
    )


def _records(data: "Data", split: str, builder: Any, seen: str) -> Any:
    """Returns the examples of a split, in which the feature `seen` is not decoded."""
    try:
        return builder.as_data_source(split, decoders={seen: Encoded()})
    except NotImplementedError:  # what TFDS says both of a missing set and of one kept as tfrecord
        place = f" --data_dir={data.data_dir}" if data.data_dir else ""
        raise UserError(
            f"builder={data.builder!r}: no array_record files in {builder.data_dir}; prepare them with "
            f"`tfds build {data.builder} --file_format=array_record{place}` (needs the package's tf extra)"
        ) from None
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"split {split!r} of {data.builder}: {reason}") from None


def _advice(error: Exception) -> str:
    """Where TensorFlow is not installed, TFDS does not find some sets, and makes no feature `Video`."""
    if type(error) is ValueError or importlib.util.find_spec("tensorflow") is not None:
        return ""
    return (
        "; it may need TensorFlow, as all sets with a feature `Video` do: install the package's tf extra, "
        "or read video files with name='video_folder'"
    )


def _image_shape(name: str, known: dict[str, Any], tfds: Any) -> tuple[int | None, int | None, int]:
    """[H, W, C] of an image or a video's frame, with None for what varies.

    Raises: UserError for a set of another kind.
    """
    image = known.get("image")
    if isinstance(known.get("video"), tfds.features.Sequence):
        image = known["video"].feature
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise UserError(f"builder={name!r}: needs a set with a feature `image` or `video` of uint8 pixels")
    *sides, channels = image.shape
    if len(sides) != 2 or channels not in MODES:
        raise UserError(
            f"builder={name!r}: has images of {image.shape}; needs [H, W, C] with C one of 1, 3, 4"
        )
    return sides[0], sides[1], channels
