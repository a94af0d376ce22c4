"""Accuracy on videos: each seen as several clips, whose probabilities are averaged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from scaling import data
from scaling.engine import tracing
from scaling.engine.build import Built
from scaling.engine.evaluator import Evaluator, Pulse
from scaling.errors import UserError
from scaling.metrics.accuracy import topk_hits
from scaling.objectives.base import Extras
from scaling.objectives.classification import Classification


@dataclass(frozen=True, kw_only=True)
class Views(Evaluator):
    """Top-1 and top-5 of the mean over `temporal` x `spatial` views of every video of a split.

    The mean is of the views' probabilities, or of their logits, as ViViT's authors have it. Every video
    counts once. Where classes are a product (an item and its motion), the accuracy of each factor
    too, from the probabilities summed over the others. `batch_size` counts clips.
    """

    split: str = "test"
    batch_size: int = 64
    temporal: int = 4  # clips, from the first that fits to the last
    spatial: int = 3  # squares along the long side: 3, or 1 for the central one
    average: Literal["probabilities", "logits"] = "probabilities"

    def check(self, name: str, built: Built) -> None:
        if not isinstance(built.task, Classification):
            objective = built.config.objective.name
            raise UserError(f"evaluate.{name}: averages classes, which objective {objective} does not have")
        try:
            data.open_views(built.config.data, self.split, self.temporal, self.spatial)
        except UserError as e:
            raise UserError(f"evaluate.{name}.{e}") from None
        super().check(name, built)

    def run(
        self, name: str, built: Built, weights: Mapping[str, Any], folder: Path, step: int, pulse: Pulse
    ) -> dict[str, float]:
        """{name_top1, name_top5, and name_<factor> for each factor of the classes}."""
        extras = Extras(collections=weights["collections"])
        classify = _classify(built)
        found = []
        shape = (self.temporal, self.spatial)
        for batch in data.view_batches(
            built.config.data, self.split, shape, self.batch_size, self.place(name, built)
        ):
            pulse()
            found.append(jax.device_get(classify(weights["params"], extras, batch)))
        logits, labels, mask = (np.concatenate(column) for column in zip(*found, strict=True))
        views, real = self.temporal * self.spatial, mask > 0
        seen = logits[real].reshape(-1, views, logits.shape[-1])  # [N, views, K]
        if self.average == "logits":
            mean = softmax(seen.mean(axis=1), axis=-1)  # [N, K]
        else:
            mean = softmax(seen, axis=-1).mean(axis=1)  # [N, K]
        scores = accuracies(mean, labels[real][::views], built.info.factors)
        return {f"{name}_{metric}": value for metric, value in scores.items()}


def accuracies(
    probabilities: np.ndarray, labels: np.ndarray, factors: Mapping[str, int] | None = None
) -> dict[str, float]:
    """top1 and top5 of `probabilities` [N, K] for `labels` [N], and the accuracy of each factor of classes.

    `factors` has the number of values of each, the last fastest in the label; their product is K.
    """
    p = jnp.asarray(probabilities, jnp.float32)
    scores = {f"top{k}": _share(topk_hits(p, jnp.asarray(labels, jnp.int32), k)) for k in (1, 5)}
    sizes = tuple((factors or {}).values())
    for axis, factor in enumerate(factors or ()):
        others = tuple(i + 1 for i in range(len(sizes)) if i != axis)
        marginal = probabilities.reshape(-1, *sizes).sum(axis=others)  # [N, values of the factor]
        truth = np.unravel_index(labels, sizes)[axis].astype(np.int32)
        scores[factor] = _share(topk_hits(jnp.asarray(marginal, jnp.float32), jnp.asarray(truth), 1))
    return scores


def _share(hits: jax.Array) -> float:
    return float(np.asarray(hits, np.float64).mean())


@lru_cache(maxsize=1)
def _classify(built: Built) -> Callable[..., Any]:
    """(params, extras, batch) -> logits [B, K], labels [B] and mask [B], whole on every process."""

    def logits(params: Any, extras: Extras, batch: Any) -> Any:
        task = built.task
        assert isinstance(task, Classification)  # held by `check`
        return task.logits(params, extras, batch), batch["label"], batch["mask"]

    return tracing.whole(built.mesh, logits)
