"""Any TFDS set of images or videos with labels, or of images with captions, read without TensorFlow.

TFDS supports its feature `Video` only if TensorFlow is installed; a `video` that is declared as a sequence of
images does not need it.

Images are decoded here and not by TFDS. Without TensorFlow it would return the indices of a picture with a
palette, the low bytes of 16-bit values, and four channels for a picture with transparency. Images are not
turned upright by their EXIF orientation: neither TFDS nor torchvision does so, and ImageNet's published
figures are for pixels as stored.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.data.decoding import MODES, decode_image
from scaling.data.sources.base import Columns
from scaling.data.video import Video, begin
from scaling.errors import UserError
from scaling.validation import shown

CAPTIONS = ("captions", "caption", "text")  # names of features that hold captions


class Encoded:
    """A decoder for TFDS that leaves an image, or each of a sequence of images, as the bytes of its file.

    It works like `tfds.decode.SkipDecoding`, which does not support sequences.
    """

    def setup(self, *, feature: Any) -> None:
        """Does nothing: how the feature would decode the bytes does not matter."""

    def decode_example_np(self, raw: Any) -> Any:
        """Returns the bytes as they are."""
        return raw

    decode_batch_example_np = decode_example_np


def _decode(raw: bytes, shape: tuple[int | None, int | None, int], where: str) -> np.ndarray:
    """Decodes an image to uint8 [H, W, C].

    Raises:
        UserError: if it is not an image of this shape; the message begins with `where`.
    """
    try:
        image = decode_image(raw, shape[2], upright=False)
    except ValueError as e:
        raise UserError(f"{where}: is not a readable image ({e}); prepare the set anew") from None
    if any(expected not in (None, size) for expected, size in zip(shape, image.shape, strict=True)):
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
            images.append(_decode(example["image"], self.image_shape, f"{self.name}: example {index}"))
            labels.append(example["label"])
        return {"image": images, "label": np.array(labels, np.int32)}


@dataclass(frozen=True)
class TfdsVideos:
    """A split of a prepared TFDS set of videos; the frames of a clip are decoded when it is read."""

    name: str
    num_classes: int
    frame_shape: tuple[int | None, int | None, int]
    records: Any  # as in `TfdsSource`
    video: Video

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        return (self.video.frames, *self.frame_shape)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> Columns:
        return self.at(indices, np.full(len(indices), 0.5))

    def at(self, indices: np.ndarray, places: np.ndarray) -> Columns:
        """Returns clips that begin at `places` [N] (see `Clips`).

        Raises:
            UserError: if a video is shorter than a clip, or a frame cannot be decoded.
        """
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
            clip, where = frames[first : first + span : self.video.stride], f"{self.name}: video {index}"
            clips.append(np.stack([_decode(raw, self.frame_shape, where) for raw in clip]))
            labels.append(example["label"])
        return {"image": clips, "label": np.array(labels, np.int32)}


@dataclass(frozen=True)
class TfdsPairs:
    """A split of a prepared TFDS set with captions."""

    name: str
    image_shape: tuple[int | None, int | None, int]
    records: Any  # as in `TfdsSource`
    key: str  # name of the feature with the captions
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: np.ndarray) -> Columns:
        encoded = [(index, self.records[index]["image"]) for index in indices.tolist()]
        images = [_decode(raw, self.image_shape, f"{self.name}: example {i}") for i, raw in encoded]
        return {"image": images}

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        return [_decode_captions(self.records[index][self.key]) for index in indices.tolist()]


def _decode_captions(value: Any) -> tuple[str, ...]:
    """Returns the captions of a feature's value: one, several, or several with ids (as in coco_captions)."""
    captions = value["text"] if isinstance(value, dict) else [value] if isinstance(value, bytes) else value
    try:
        return tuple(text.decode("utf-8") for text in captions)
    except UnicodeDecodeError as e:
        raise UserError(f"caption {shown(captions)}: is not text in UTF-8 ({e.reason})") from None


def tfds_set(name: str, folder: str | None, split: str, video: Video) -> TfdsSource | TfdsVideos | TfdsPairs:
    """Returns a split of the set `name` of TFDS, in `folder` or TFDS's usual one.

    `split` is any of TFDS's names, including slices such as "train[:10%]". Besides images or videos the set
    must have a feature `label`, or else captions under a name in `CAPTIONS`.

    Raises:
        UserError: if the set or the split does not exist, is not prepared, or has no suitable features.
    """
    import tensorflow_datasets as tfds  # half a second; imports no TensorFlow

    try:
        builder = tfds.builder(name, data_dir=folder)
    except (tfds.core.DatasetNotFoundError, ValueError, ModuleNotFoundError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"data.builder={name!r}: TFDS cannot make it ({reason}){_tensorflow_advice(error)}"
        ) from None
    features = builder.info.features
    by_name = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    shape, label = _image_shape(name, by_name, tfds), by_name.get("label")
    key = next((key for key in CAPTIONS if key in by_name), None)
    pixels = "video" if "video" in by_name else "image"
    if isinstance(label, tfds.features.ClassLabel) and label.num_classes is not None:
        records = _records(name, folder, split, builder, pixels)
        if pixels == "video":
            return TfdsVideos(builder.name, label.num_classes, shape, records, video)
        return TfdsSource(builder.name, label.num_classes, shape, records)
    if key is not None:
        return TfdsPairs(builder.name, shape, _records(name, folder, split, builder, pixels), key)
    raise UserError(
        f"data.builder={name!r}: needs a set with a feature `label` of known classes, or captions "
        f"({', '.join(CAPTIONS)})"
    )


def _records(name: str, folder: str | None, split: str, builder: Any, pixels: str) -> Any:
    """Returns the examples of a split, in which the feature named `pixels` is not decoded."""
    try:
        return builder.as_data_source(split, decoders={pixels: Encoded()})
    except NotImplementedError:  # TFDS raises it for a missing set, and for one stored as tfrecord
        place = f" --data_dir={folder}" if folder else ""
        raise UserError(
            f"data.builder={name!r}: no array_record files in {builder.data_dir}; prepare them with "
            f"`tfds build {name} --file_format=array_record{place}` (needs the package's tf extra)"
        ) from None
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"split {split!r} of {name}: {reason}") from None


def _tensorflow_advice(error: Exception) -> str:
    """Returns advice to install TensorFlow, if it is missing: some sets, and the feature `Video`, need it."""
    if type(error) is ValueError or importlib.util.find_spec("tensorflow") is not None:
        return ""
    return (
        "; it may need TensorFlow, as all sets with a feature `Video` do: install the package's tf extra, "
        "or read video files with name='video_folder'"
    )


def _image_shape(name: str, features: dict[str, Any], tfds: Any) -> tuple[int | None, int | None, int]:
    """Returns [H, W, C] of an image or of a video's frame, with None for a side that varies.

    Raises:
        UserError: if the set does not have images or videos of uint8 pixels.
    """
    image = features.get("image")
    if isinstance(features.get("video"), tfds.features.Sequence):
        image = features["video"].feature
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise UserError(
            f"data.builder={name!r}: needs a set with a feature `image` or `video` of uint8 pixels"
        )
    *sides, channels = image.shape
    if len(sides) != 2 or channels not in MODES:
        raise UserError(
            f"data.builder={name!r}: has images of {image.shape}; needs [H, W, C] with C one of 1, 3, 4"
        )
    return sides[0], sides[1], channels
