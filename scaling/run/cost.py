"""The cost of one example and of one step of a run, counted from its own loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from scaling import flops, objectives
from scaling.models import table
from scaling.models.base import HasTokens
from scaling.objectives.base import Extras, OnePass
from scaling.run.build import Run, shared_by_runs


@shared_by_runs
def run_cost(run: Run) -> dict[str, float | None]:
    """Counts what one example and one step cost, on the plain form of the model (no remat, float32).

    `gmacs` is the forward pass of one example, counted from the objective's own loss, or from its `forward`
    where the loss takes several passes; `train_flops_per_step` is twice the multiply-adds of the gradient of
    the loss for one global batch.
    """
    plain = table.plain(run.model)
    if not objectives.trains(run.config.objective.name):
        return {**table.cost(plain, run.batch(1)), "train_flops_per_step": None}
    objective: Any = dataclasses.replace(run.objective, model=plain)  # type: ignore[type-var]
    collections = dict(run.variable_shapes)
    params = collections.pop("params")
    extras = Extras(collections=collections, helpers=run.helper_shapes)

    def loss(params: Any, extras: Extras, batch: Any, train: bool) -> jax.Array:
        return objective.loss(params, extras, batch, jax.random.key(0), train).value

    def one_pass(params: Any, extras: Extras, batch: Any) -> Any:
        if isinstance(objective, OnePass):
            return objective.forward(params, extras, batch)
        return loss(params, extras, batch, False)

    forward = flops.macs(lambda p, b: one_pass(p, _zeros(extras), b), params, run.batch(1))
    gradient = jax.grad(lambda p, b: loss(p, _zeros(extras), b, True))
    step = flops.macs(gradient, params, run.batch(run.config.data.batch_size))
    return {
        "params": sum(int(x.size) for x in jax.tree.leaves(params)),
        "gmacs": forward / 1e9,
        "gflops": 2 * forward / 1e9,
        "tokens": plain.tokens(run.image_shape) if isinstance(plain, HasTokens) else None,
        "train_flops_per_step": 2 * step,
    }


def _zeros(extras: Extras) -> Extras:
    """Returns concrete stand-ins, for tracing only."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), extras)
