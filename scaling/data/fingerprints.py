"""Fingerprints of data sets: enough to tell, when a run is resumed, whether its data are still the same."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.data.options import DATASETS, Data
from scaling.data.pairs import Pairs

EXAMPLES = 16  # number of examples that are looked at, evenly spaced
WITHIN = 2e-3  # bound on the difference of two means: decoders round pixels, whose range is 1, differently


def fingerprint(data: Data) -> dict[str, Any]:
    """Returns the number of training examples and, of 16 of them, a digest of all but the images, and means.

    A mean is that of an image's pixels in [0, 1], or of its latent.

    Raises:
        UserError: if an example cannot be read.
    """
    source = DATASETS[data.name].open(data, data.train_split)
    indices = np.unique(np.linspace(0, len(source) - 1, EXAMPLES).astype(np.int64))
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
