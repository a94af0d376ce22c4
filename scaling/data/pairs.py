"""Pairs of images and captions: what has them, and their captions as tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from scaling.data.sources import Columns, Source, Wrapped
from scaling.data.text import Tokenizer
from scaling.data.transforms import CAPTION, generators
from scaling.errors import UserError

LEARNED_FROM = 100_000  # examples whose captions a vocabulary is learned from, at most


@runtime_checkable
class Pairs(Source, Protocol):
    """Images with captions: its columns leave captions out, which are one or more of each image."""

    def captions(self, indices: np.ndarray) -> list[tuple[str, ...]]: ...


@dataclass(frozen=True)
class Tokenized(Wrapped):
    """Pairs whose columns have their captions as tokens (`Tokenizer`).

    Of an image's captions training draws one, and evaluation takes the first.
    """

    source: Pairs
    tokenizer: Tokenizer

    def read(self, indices: np.ndarray) -> Columns:
        return self._columns(indices, [0] * len(indices))

    def draw(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Columns:
        return self._columns(
            indices, [int(rng.integers(2**31)) for rng in generators(seed, positions, CAPTION)]
        )

    def _columns(self, indices: np.ndarray, chosen: list[int]) -> Columns:
        several = self.source.captions(indices)  # of each image
        for index, captions in zip(indices.tolist(), several, strict=True):
            if not captions:
                raise UserError(f"{self.name}: example {index} has no caption; leave it out, or give it one")
        texts = [captions[i % len(captions)] for captions, i in zip(several, chosen, strict=True)]
        return {**self.source.read(indices), **self.tokenizer(texts)}


def all_captions(pairs: Pairs) -> Iterator[str]:
    """What a vocabulary is learned from, in order."""
    for start in range(0, min(len(pairs), LEARNED_FROM), 1000):
        for captions in pairs.captions(np.arange(start, min(start + 1000, len(pairs)))):
            yield from captions
