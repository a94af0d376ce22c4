"""What pre-training on pairs is measured by: right and wrong captions of a split, and its hidden words."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling import data
from scaling.engine import tracing
from scaling.engine.averages import averages
from scaling.engine.build import Built
from scaling.engine.captions import captions_of, most_frequent, placed
from scaling.engine.evaluator import Evaluator, Pulse
from scaling.errors import UserError
from scaling.objectives.vision_language import VisionLanguage


@dataclass(frozen=True, kw_only=True)
class Matching(Evaluator):
    """The metrics of the objective vision_language over every pair of a split, each counted once.

    Each image meets its own caption and wrong ones: the next in a random order of the split that is the same
    in every run, which have another text. `mlm_unigram` is the accuracy, on the same hidden tokens, of always
    naming the most frequent token of the training captions.
    """

    split: str = "test"

    def check(self, name: str, built: Built) -> None:
        task = vision_language(name, built)
        super().check(name, built)
        if len(data.open_source(built.config.data, self.split)) <= task.wrong:
            raise UserError(f"evaluate.{name}.split={self.split!r}: has too few captions")

    def run(
        self, name: str, built: Built, weights: Mapping[str, Any], folder: Path, step: int, pulse: Pulse
    ) -> dict[str, float]:
        """{name_loss, name_itm_accuracy, name_mlm_accuracy, name_mlm_unigram, ...}, as its tasks are."""
        values = averages(built, weights, self._batches(name, built), pulse)
        if vision_language(name, built).mlm:
            values["mlm_unigram"] = self._unigram(name, built)
        return {f"{name}_{metric}": value for metric, value in values.items()}

    def _batches(self, name: str, built: Built) -> Iterator[dict[str, jax.Array]]:
        """The split's batches, with wrong captions "wrong_text" and "wrong_mask" [B, K, L]."""
        place, tokens = self.place(name, built), captions_of(built.config.data, self.split).first()
        others = wrong_captions(tokens["text"], vision_language(name, built).wrong)  # [N, K]
        for step, batch in enumerate(self.batches(name, built, self.split)):
            rows = np.minimum(step * self.batch_size + np.arange(self.batch_size), len(others) - 1)
            wrong = {
                f"wrong_{short}": placed(tokens[column][others[rows]], place)
                for short, column in (("text", "text"), ("mask", "text_mask"))
            }
            yield {**batch, **wrong}

    def _unigram(self, name: str, built: Built) -> float:
        common, right, count = most_frequent(built.config.data), 0.0, 0.0
        hits = _hits(built)
        for batch in self.batches(name, built, self.split):
            found = jax.device_get(hits(batch, common))
            right, count = right + float(found[0]), count + float(found[1])
        return right / count


def vision_language(name: str, built: Built) -> VisionLanguage:
    if not isinstance(built.task, VisionLanguage):
        other = built.config.objective.name
        raise UserError(f"evaluate.{name}: matches pairs, which objective {other} does not learn")
    return built.task


def wrong_captions(text: np.ndarray, count: int) -> np.ndarray:
    """For each example of `text` [N, L] the indices int64 [N, count] of others with another caption.

    They are the next ones in a random order, the same on every machine, so that each caption is wrong as
    often as it is right. Raises UserError where there are not so many.
    """
    order = np.random.Generator(np.random.Philox(0)).permutation(len(text))
    ring, found = np.tile(order, 2), np.empty((len(text), count), np.int64)
    for place, row in enumerate(order):
        following = ring[place + 1 : place + len(order)]
        for near in (following[: 2 * count], following):  # the former is nearly always enough
            others = near[(text[near] != text[row]).any(axis=1)][:count]
            if len(others) == count:
                break
        else:
            raise UserError(f"evaluation: needs {count} wrong captions of an image, and has {len(others)}")
        found[row] = others
    return found


@lru_cache(maxsize=1)
def _hits(built: Built) -> Callable[..., Any]:
    """(batch, token) -> how many of the hidden tokens are this one, and how many are hidden."""
    task = vision_language("", built)

    def step(batch: Any, token: int) -> tuple[jax.Array, jax.Array]:
        hidden = task.hidden_words(batch) & (batch["mask"] > 0)[:, None]
        return (hidden & (batch["text"] == token)).sum(), hidden.sum()

    return jax.jit(tracing.on(built.mesh, step))
