"""The captions of a whole split as tokens, which evaluators compare with images other than their own."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling import data
from scaling.data import Data
from scaling.data.pairs import Tokenized, all_captions

CHUNK = 10_000  # captions that are turned into tokens at a time


class Captions(NamedTuple):
    """Of every image in turn, one or more."""

    tokens: dict[str, np.ndarray]  # the columns that the tokenizer gives, [M, L] each
    image: np.ndarray  # int64 [M], whose each one is

    def first(self) -> dict[str, np.ndarray]:
        """Of each image the first, [N, L] each."""
        rows = np.flatnonzero(np.diff(self.image, prepend=-1))
        return {name: column[rows] for name, column in self.tokens.items()}

    def of(self, images: int | None) -> "Captions":
        """Those of the first `images`; None: all."""
        count = len(self.image) if images is None else int(np.searchsorted(self.image, images))
        return Captions({name: column[:count] for name, column in self.tokens.items()}, self.image[:count])


def source_of(chosen: Data, split: str) -> Tokenized:
    source = data.open_source(chosen, split)
    assert isinstance(source, Tokenized)  # the objective would not have been made
    return source


@lru_cache(maxsize=2)
def captions_of(chosen: Data, split: str) -> Captions:
    """All of a split, the same on every process."""
    source = source_of(chosen, split)
    several = source.source.captions(np.arange(len(source)))
    counts = [len(texts) for texts in several]
    tokens = source.tokenizer([text for texts in several for text in texts])
    return Captions(tokens, np.repeat(np.arange(len(several)), counts))


@lru_cache(maxsize=2)
def most_frequent(chosen: Data) -> int:
    """The token that is part of words most often in the captions of the training split (`all_captions`)."""
    source = source_of(chosen, chosen.train_split)
    captions, counts = list(all_captions(source.source)), np.zeros(source.tokenizer.info.vocabulary, np.int64)
    for start in range(0, len(captions), CHUNK):
        columns = source.tokenizer(captions[start : start + CHUNK])
        counts += np.bincount(columns["text"][columns["text_word"] >= 0], minlength=len(counts))
    return int(counts.argmax())


def placed(x: np.ndarray, place: Any) -> jax.Array:
    """A global array of what every process holds whole."""
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])
