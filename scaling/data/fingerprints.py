"""Fingerprints of data sets: enough to tell whether they are still the same.

Few examples that lie evenly over a split are read, enough to notice a set that was made anew.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.data.options import DATASETS, Data, open_source
from scaling.data.pairs import Pairs
from scaling.data.pipeline import eval_rows

WITHIN = 2e-3  # bound on the difference of two means: decoders round pixels, whose range is 1, differently


def of_images(data: Data, split: str, examples: int = 64) -> str:
    """Returns a digest of a split's number of examples, and of some images as evaluation sees them."""
    source = open_source(data, split)
    image = eval_rows(0, source, data, len(source), _spread(len(source), examples))["image"]
    return hashlib.sha256(f"{len(source)} {image.shape}".encode() + image.tobytes()).hexdigest()[:16]


def of_training(data: Data, examples: int = 16) -> dict[str, Any]:
    """Returns the number of training examples and, of some, a digest of all but the images, and means.

    A mean is that of an image's pixels in [0, 1], or of its latent. `difference` compares two of these:
    unlike digests of pixels, they are the same for every version of a decoder.

    Raises:
        UserError: if an example cannot be read.
    """
    source = DATASETS[data.name].open(data, data.train_split)
    indices = _spread(len(source), examples)
    columns = source.read(indices)
    images = [np.asarray(image) for image in columns.pop("image")]
    others: dict[str, Any] = {name: np.asarray(column).tolist() for name, column in columns.items()}
    if isinstance(source, Pairs):
        others["captions"] = source.captions(indices)
    return {
        "examples": len(source),
        "others": hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:16],
        "means": [_mean(image) for image in images],
    }


def _spread(count: int, examples: int) -> np.ndarray:
    """Returns the indices of examples that lie evenly over a split of `count`."""
    return np.unique(np.linspace(0, count - 1, examples).astype(np.int64))


def _mean(image: np.ndarray) -> float:
    return round(float(image.mean()) / (255.0 if image.dtype == np.uint8 else 1.0), 5)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns how the data differ from what they were, as in "has 9 examples, not 10"; "" if they do not."""
    if now["examples"] != before["examples"]:
        return f"has {now['examples']:,} examples, not {before['examples']:,}"
    if now["others"] != before["others"]:
        return "has not the same labels or captions"
    if not np.allclose(now["means"], before["means"], rtol=0.0, atol=WITHIN):
        return "has not the same images"
    return ""
