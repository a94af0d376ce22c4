"""The objective's metrics over many batches: sums and counts, so that every example weighs the same."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from scaling.engine import tracing
from scaling.engine.build import Built
from scaling.engine.evaluator import Pulse
from scaling.errors import NotFinite
from scaling.objectives.base import Extras
from scaling.randomness import stream


def averages(
    built: Built, weights: Mapping[str, Any], batches: Iterable[Any], pulse: Pulse
) -> dict[str, float]:
    """Returns {metric: value} over the real examples of the batches, as evaluation measures them.

    Raises: NotFinite for a metric that no example has.
    """
    extras = Extras(collections=weights["collections"])
    measure = step(built)
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for i, batch in enumerate(batches):
        pulse()
        found = jax.device_get(measure(weights["params"], extras, batch, jnp.asarray(i)))
        for metric in found[0]:
            sums[metric] += float(found[0][metric])
            counts[metric] += float(found[1][metric])
    for metric, count in counts.items():
        if count == 0.0:
            raise NotFinite(f"{metric}: there is nothing to measure it by")
    return {metric: sums[metric] / counts[metric] for metric in sums}


@lru_cache(maxsize=1)
def step(built: Built) -> Callable[..., Any]:
    """(params, extras, batch, batch index) -> sums and counts of the objective's metrics."""
    key = stream(jax.random.key(built.config.train.seed), "evaluate")

    def one(params: Any, extras: Extras, batch: Any, index: jax.Array) -> tuple[Any, Any]:
        result = built.task.loss(params, extras, batch, jax.random.fold_in(key, index), train=False)
        return result.sums, result.counts

    return jax.jit(tracing.on(built.mesh, one))
