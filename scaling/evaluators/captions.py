"""All captions of a split as tokens, for evaluators that compare them with images other than their own."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling import data
from scaling.data import Data
from scaling.data.pairs import Tokenized, all_captions

CHUNK = 10_000  # captions tokenized at a time


class Captions(NamedTuple):
    """Tokenized captions, one or more of every image, in the order of the images."""

    tokens: dict[str, np.ndarray]  # columns of the tokenizer, [M, L] each
    image: np.ndarray  # int64 [M], index of each caption's image

    def first(self) -> dict[str, np.ndarray]:
        """Returns the first caption of each image, [N, L] per column."""
        rows = np.flatnonzero(np.diff(self.image, prepend=-1))
        return {name: column[rows] for name, column in self.tokens.items()}

    def of(self, images: int | None) -> "Captions":
        """Returns the captions of the first `images` images, or all if None."""
        count = len(self.image) if images is None else int(np.searchsorted(self.image, images))
        return Captions({name: column[:count] for name, column in self.tokens.items()}, self.image[:count])


def source_of(chosen: Data, split: str) -> Tokenized:
    """Opens a split that has captions."""
    source = data.open_source(chosen, split)
    assert isinstance(source, Tokenized)  # no objective with texts is made for other data
    return source


@lru_cache(maxsize=2)
def captions_of(chosen: Data, split: str) -> Captions:
    """Returns all captions of a split, the same on every process."""
    source = source_of(chosen, split)
    texts_by_image = source.source.captions(np.arange(len(source)))
    counts = [len(texts) for texts in texts_by_image]
    tokens = source.tokenizer([text for texts in texts_by_image for text in texts])
    return Captions(tokens, np.repeat(np.arange(len(texts_by_image)), counts))


@lru_cache(maxsize=2)
def most_frequent(chosen: Data) -> int:
    """Returns the token that is most often part of a word in `all_captions` of the training split."""
    source = source_of(chosen, chosen.train_split)
    captions, counts = list(all_captions(source.source)), np.zeros(source.tokenizer.info.vocabulary, np.int64)
    for start in range(0, len(captions), CHUNK):
        columns = source.tokenizer(captions[start : start + CHUNK])
        counts += np.bincount(columns["text"][columns["text_word"] >= 0], minlength=len(counts))
    return int(counts.argmax())


def placed(x: np.ndarray, sharding: Any) -> jax.Array:
    """Returns the global array, with this sharding, of an array that every process has completely."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
