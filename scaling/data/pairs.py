"""Pairs of images and captions: the protocol of sources that hold them, and their captions as tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from scaling.data.sources.base import Columns, Source, Wrapped
from scaling.data.text import Tokenizer
from scaling.data.transforms import CAPTION, generators
from scaling.errors import UserError

LEARNED_FROM = 100_000  # maximum number of examples whose captions a vocabulary is learned from


@runtime_checkable
class Pairs(Source, Protocol):
    """A source of images with one or more captions each, which `read` leaves out of its columns."""

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]:
        """Returns the captions of each of these examples."""
        ...


@dataclass(frozen=True)
class Tokenized(Wrapped):
    """Pairs whose columns include a caption as tokens (`Tokenizer`).

    Training draws one of an image's captions, and evaluation takes the first.
    """

    source: Pairs
    tokenizer: Tokenizer

    def read(self, indices: np.ndarray) -> Columns:
        return self._columns(indices, [0] * len(indices))

    def read_train(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        return self._columns(
            indices, [int(rng.integers(2**31)) for rng in generators(seed, positions, CAPTION)]
        )

    def _columns(self, indices: np.ndarray, choices: list[int]) -> Columns:
        """Returns columns with one caption of each image: `choices`, modulo the number that it has."""
        captions_of = self.source.captions(indices)  # one tuple for each image
        for index, captions in zip(indices.tolist(), captions_of, strict=True):
            if not captions:
                raise UserError(f"{self.name}: example {index} has no caption; leave it out, or give it one")
        texts = [captions[i % len(captions)] for captions, i in zip(captions_of, choices, strict=True)]
        return {**self.source.read(indices), **self.tokenizer(texts)}


def all_captions(pairs: Pairs) -> Iterator[str]:
    """Yields the captions that a vocabulary is learned from, in the order of their examples."""
    for start in range(0, min(len(pairs), LEARNED_FROM), 1000):
        for captions in pairs.captions(np.arange(start, min(start + 1000, len(pairs)))):
            yield from captions
