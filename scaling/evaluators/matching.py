"""The evaluator of pre-training on pairs: right and wrong captions of a split, and its hidden words."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from scaling import data
from scaling.errors import UserError
from scaling.evaluators.base import Context, Evaluator, Measure, Weights
from scaling.evaluators.captions import captions_of, most_frequent, placed
from scaling.evaluators.mean_metrics import mean_metrics, metric_names
from scaling.objectives.vision_language import VisionLanguage
from scaling.parallel import tracing
from scaling.run.build import Run, shared_by_runs

WRONG = {"wrong_text": "text", "wrong_mask": "text_mask"}  # columns of wrong captions, and of whose form


@dataclass(frozen=True, kw_only=True)
class Matching(Evaluator):
    """The metrics of the objective vision_language over every pair of a split, each counted once.

    Each image is paired with its own caption and with wrong ones: the next captions with another text, in a
    random order of the split that is the same in every run. `mlm_unigram` is the accuracy, on the same hidden
    tokens, of always naming the most frequent token of the training captions.
    """

    split: str = "test"

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        """Checks also that the objective is vision_language and that there are enough captions.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        objective = vision_language(name, run)
        super().check(name, run, needed)
        if len(data.open_source(run.config.data, self.split)) <= objective.wrong:
            raise UserError(f"evaluators.{name}.split={self.split!r}: has too few captions")

    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        objective, batch = vision_language(name, run), run.batch(self.batch_size)
        for wrong, column in WRONG.items():
            shape = (self.batch_size, objective.wrong, *batch[column].shape[1:])
            batch[wrong] = jax.ShapeDtypeStruct(shape, batch[column].dtype)
        names = (*metric_names(run, batch), *(["mlm_unigram"] if objective.mlm else []))
        return tuple(f"{name}_{metric}" for metric in names)

    def prepare(self, context: Context) -> Measure:
        """Returns the measurement of {name_loss, name_itm_accuracy, name_mlm_accuracy, ...} for its tasks."""
        objective = vision_language(context.name, context.run)
        tokens = captions_of(context.run.config.data, self.split).first()
        others = wrong_captions(tokens["text"], objective.wrong)  # [N, K]
        mean = mean_metrics(context)
        unigram = cache(lambda: self._unigram(context))  # no weights change it

        def measure(weights: Weights, step: int) -> dict[str, float]:
            values = mean(weights, self._batches(context, tokens, others))
            values |= {"mlm_unigram": unigram()} if objective.mlm else {}
            return {f"{context.name}_{metric}": value for metric, value in values.items()}

        return measure

    def _batches(
        self, context: Context, tokens: Mapping[str, np.ndarray], others: np.ndarray
    ) -> Iterator[dict[str, jax.Array]]:
        """Yields the split's batches, with wrong captions "wrong_text" and "wrong_mask" [B, K, L]."""
        batch_sharding = self.batch_sharding(context.name, context.run)
        for step, batch in enumerate(self.batches(context, self.split)):
            rows = np.minimum(step * self.batch_size + np.arange(self.batch_size), len(others) - 1)
            wrong = {
                name: placed(tokens[column][others[rows]], batch_sharding) for name, column in WRONG.items()
            }
            yield {**batch, **wrong}

    def _unigram(self, context: Context) -> float:
        """Returns the accuracy of always naming the most frequent token."""
        token, hits, count = most_frequent(context.run.config.data), 0.0, 0.0
        count_hits = _make_count_hits(context.run)
        for batch in self.batches(context, self.split):
            batch_hits, batch_count = jax.device_get(count_hits(batch, token))
            hits, count = hits + float(batch_hits), count + float(batch_count)
        return hits / count


def vision_language(name: str, run: Run) -> VisionLanguage:
    """Returns the run's vision_language objective.

    Raises:
        UserError: if it has another objective; it names the evaluator.
    """
    if not isinstance(run.objective, VisionLanguage):
        other = run.config.objective.name
        raise UserError(f"evaluators.{name}: matches pairs, which objective {other} does not learn")
    return run.objective


def wrong_captions(text: np.ndarray, count: int) -> np.ndarray:
    """Returns indices int64 [N, count]: for each example of `text` [N, L], others with another caption.

    They are the next ones in a random order, the same on every machine, so that each caption is wrong as
    often as it is right.

    Raises:
        UserError: if an example has fewer than `count` others.
    """
    order = np.random.Generator(np.random.Philox(0)).permutation(len(text))
    ring, indices = np.tile(order, 2), np.empty((len(text), count), np.int64)
    for position, row in enumerate(order):
        following = ring[position + 1 : position + len(order)]
        for candidates in (following[: 2 * count], following):  # the first few are nearly always enough
            others = candidates[(text[candidates] != text[row]).any(axis=1)][:count]
            if len(others) == count:
                break
        else:
            raise UserError(f"evaluation: needs {count} wrong captions of an image, and has {len(others)}")
        indices[row] = others
    return indices


@shared_by_runs
def _make_count_hits(run: Run) -> Callable[..., Any]:
    """Returns a function (batch, token) -> how many hidden tokens are this one, and how many are hidden."""
    objective = vision_language("", run)

    def step(batch: Any, token: int) -> tuple[jax.Array, jax.Array]:
        hidden = objective.hidden_words(batch) & (batch["mask"] > 0)[:, None]
        return (hidden & (batch["text"] == token)).sum(), hidden.sum()

    return jax.jit(tracing.trace_on_mesh(run.mesh, step))
