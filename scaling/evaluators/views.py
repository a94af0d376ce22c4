"""The evaluator of accuracy on videos, each of which is several clips whose predictions are averaged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from scaling import data
from scaling.errors import UserError
from scaling.evaluators.base import Context, Evaluator, Measure, Weights
from scaling.metrics.accuracy import topk_hits
from scaling.metrics.kinds import with_error_names, with_errors
from scaling.objectives.base import Extras
from scaling.objectives.classification import Classification
from scaling.parallel import tracing
from scaling.run.build import Run, shared_by_runs


@dataclass(frozen=True, kw_only=True)
class Views(Evaluator):
    """Top-1 and top-5 accuracy of the mean over `num_clips` x `num_crops` views of every video of a split.

    The mean is that of the views' probabilities, or of their logits, as in ViViT's code. Every video counts
    once. If classes are a product (an item and its motion), the accuracy of each factor is measured too, from
    the probabilities summed over the other factors. `batch_size` counts clips.
    """

    split: str = "test"
    batch_size: int = 64
    num_clips: int = 4  # number of clips, evenly from the first that fits to the last
    num_crops: int = 3  # number of squares along the long side: 3, or 1 for the central one
    average: Literal["probabilities", "logits"] = "probabilities"

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        """Checks also that the objective classifies, and that the split has such clips and crops.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        if not isinstance(run.objective, Classification):
            objective = run.config.objective.name
            raise UserError(f"evaluators.{name}: averages classes, which objective {objective} does not have")
        try:
            data.open_views(run.config.data, self.split, self.num_clips, self.num_crops)
        except UserError as e:
            raise UserError(f"evaluators.{name}.{e}") from None
        super().check(name, run, needed)

    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        return with_error_names(f"{name}_{metric}" for metric in ("top1", "top5", *run.info.factors))

    def prepare(self, context: Context) -> Measure:
        """Returns the measurement of {name_top1, name_top5, name_<factor> for each factor of the classes}.

        Each has its standard error.
        """
        from scipy.special import softmax  # half a second, which other runs need not wait

        run, compute_logits = context.run, _make_logits(context.run)
        place = self.batch_sharding(context.name, run)
        shape, views = (self.num_clips, self.num_crops), self.num_clips * self.num_crops

        def measure(weights: Weights, step: int) -> dict[str, float]:
            extras = context.extras(weights)
            outputs = []
            for batch in data.view_batches(run.config.data, self.split, shape, self.batch_size, place):
                context.check_interrupt()
                outputs.append(jax.device_get(compute_logits(weights["params"], extras, batch)))
            logits, labels, mask = (np.concatenate(column) for column in zip(*outputs, strict=True))
            real = mask > 0
            by_video = logits[real].reshape(-1, views, logits.shape[-1])  # [N, views, K]
            if self.average == "logits":
                mean = softmax(by_video.mean(axis=1), axis=-1)  # [N, K]
            else:
                mean = softmax(by_video, axis=-1).mean(axis=1)  # [N, K]
            scores = accuracies(mean, labels[real][::views], run.info.factors)
            named = {f"{context.name}_{metric}": value for metric, value in scores.items()}
            return with_errors(named, len(mean))

        return measure


def accuracies(
    probabilities: np.ndarray, labels: np.ndarray, factors: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Returns top1 and top5 of `probabilities` [N, K] for `labels` [N], and the accuracy of each factor.

    `factors` maps each factor of the classes to its number of values, whose product is K; the last factor
    varies fastest in the label.
    """
    p = jnp.asarray(probabilities, jnp.float32)
    scores = {f"top{k}": _mean(topk_hits(p, jnp.asarray(labels, jnp.int32), k)) for k in (1, 5)}
    sizes = tuple((factors or {}).values())
    for axis, factor in enumerate(factors or ()):
        others = tuple(i + 1 for i in range(len(sizes)) if i != axis)
        marginal = probabilities.reshape(-1, *sizes).sum(axis=others)  # [N, values of the factor]
        truth = np.unravel_index(labels, sizes)[axis].astype(np.int32)
        scores[factor] = _mean(topk_hits(jnp.asarray(marginal, jnp.float32), jnp.asarray(truth), 1))
    return scores


def _mean(hits: jax.Array) -> float:
    return float(np.asarray(hits, np.float64).mean())


@shared_by_runs
def _make_logits(run: Run) -> Callable[..., Any]:
    """Returns a function (params, extras, batch) -> logits [B, K], labels [B] and mask [B]; replicated."""

    def logits(params: Any, extras: Extras, batch: Any) -> Any:
        objective = run.objective
        assert isinstance(objective, Classification)  # ensured by `check`
        return objective.logits(params, extras, batch), batch["label"], batch["mask"]

    return tracing.jit_replicated(run.mesh, logits)
