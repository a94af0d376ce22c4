"""The objective's mean metrics over many batches, by sums and counts, so that every example counts once."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from scaling.errors import NotFinite
from scaling.evaluators.base import CheckInterrupt
from scaling.objectives.base import Extras
from scaling.parallel import tracing
from scaling.randomness import derive_key
from scaling.run.build import Run, shared_by_runs


def mean_metrics(
    run: Run, weights: Mapping[str, Any], batches: Iterable[Any], check_interrupt: CheckInterrupt
) -> dict[str, float]:
    """Returns the mean of each of the objective's metrics over the real examples of the batches.

    Raises:
        NotFinite: if no example counts for a metric.
    """
    extras = Extras(collections=weights["collections"])
    measure, key = step(run), derive_key(jax.random.key(run.config.train.seed), "evaluate")
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for i, batch in enumerate(batches):
        check_interrupt()
        rng = jax.random.fold_in(key, i)
        batch_sums, batch_counts = jax.device_get(measure(weights["params"], extras, batch, rng))
        for metric, value in batch_sums.items():
            sums[metric] += float(value)
            counts[metric] += float(batch_counts[metric])
    for metric, count in counts.items():
        if count == 0.0:
            raise NotFinite(f"{metric}: there is nothing to measure it by")
    return {metric: sums[metric] / counts[metric] for metric in sums}


@shared_by_runs
def step(run: Run) -> Callable[..., Any]:
    """Returns a function (params, extras, batch, key of random numbers) -> sums and counts of the metrics."""

    def measure(params: Any, extras: Extras, batch: Any, rng: jax.Array) -> tuple[Any, Any]:
        result = run.objective.loss(params, extras, batch, rng, train=False)
        return result.sums, result.counts

    return jax.jit(tracing.trace_on_mesh(run.mesh, measure))
