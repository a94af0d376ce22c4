"""The objective's mean metrics over many batches, by sums and counts, so that every example counts once."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from scaling.errors import NotFinite
from scaling.evaluators.base import Context, Weights
from scaling.metrics.kinds import with_error_names, with_errors
from scaling.objectives.base import Extras
from scaling.parallel import tracing
from scaling.randomness import derive_key
from scaling.run.build import Run, shared_by_runs


def mean_metrics(context: Context) -> Callable[[Weights, Iterable[Any]], dict[str, float]]:
    """Returns a function (weights, batches) -> mean of each of the objective's metrics over real examples.

    Shares come with their standard errors.

    Raises:
        NotFinite: from the returned function, if no example counts for a metric.
    """
    measure = step(context.run)
    key = derive_key(jax.random.key(context.run.config.train.seed), "evaluate")

    def _mean(weights: Weights, batches: Iterable[Any]) -> dict[str, float]:
        extras = context.extras(weights)
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        for i, batch in enumerate(batches):
            rng = jax.random.fold_in(key, i)
            batch_sums, batch_counts = jax.device_get(measure(weights["params"], extras, batch, rng))
            for metric, value in batch_sums.items():
                sums[metric] += float(value)
                counts[metric] += float(batch_counts[metric])
        for metric, count in counts.items():
            if count == 0.0:
                raise NotFinite(f"{metric}: there is nothing to measure it by")
        return with_errors({metric: sums[metric] / counts[metric] for metric in sums}, counts)

    return _mean


def metric_names(run: Run, batch: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[str, ...]:
    """Returns the names of the objective's metrics and of their standard errors on such a batch.

    The loss is traced once for them.
    """
    variables = dict(run.variable_shapes)
    params = variables.pop("params")
    size = next(iter(batch.values())).shape[0]
    masked = {**batch, "mask": jax.ShapeDtypeStruct((size,), "float32")}

    def sums(params: Any, extras: Extras, batch: Any) -> Any:
        return run.objective.loss(params, extras, batch, jax.random.key(0), train=False).sums

    extras = Extras(collections=variables, helpers=run.helper_shapes)
    return with_error_names(jax.eval_shape(tracing.trace_on_mesh(run.mesh, sums), params, extras, masked))


@shared_by_runs
def step(run: Run) -> Callable[..., Any]:
    """Returns a function (params, extras, batch, key of random numbers) -> sums and counts of the metrics."""

    def measure(params: Any, extras: Extras, batch: Any, rng: jax.Array) -> tuple[Any, Any]:
        result = run.objective.loss(params, extras, batch, rng, train=False)
        return result.sums, result.counts

    return jax.jit(tracing.trace_on_mesh(run.mesh, measure))
