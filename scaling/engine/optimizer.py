"""The update: gradient transform, schedule, per-parameter rules, and averages of the weights."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scaling.engine.config import Optimizer
from scaling.engine.sharding import path_of

OPTIMIZERS: dict[str, Callable[[Optimizer], optax.GradientTransformation]] = {
    "adamw": lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
    "sgd": lambda o: optax.trace(decay=o.b1),
}

# What follows the warm-up, as a share of the peak rate over the steps that remain.
SCHEDULES: dict[str, Callable[[int], optax.Schedule]] = {
    "constant": lambda steps: optax.constant_schedule(1.0),
    "cosine": lambda steps: optax.cosine_decay_schedule(1.0, max(steps, 1)),
}

Update = Callable[[Any, Any, Any, jax.Array, Mapping[str, jax.Array]], tuple[Any, Any, jax.Array]]


def transform(options: Optimizer) -> optax.GradientTransformation:
    """Gradient to direction: clipping, then the optimiser without rate and decay."""
    clip = optax.identity() if options.clip is None else optax.clip_by_global_norm(options.clip)
    return optax.chain(clip, OPTIMIZERS[options.name](options))


def make_update(options: Optimizer, warmup: int, total: int) -> Update:
    """`update(grads, opt_state, params, step, scalars) -> (params, opt_state, gradient norm)`.

    The rate and the decay come as traced `scalars` ("learning_rate", "weight_decay"), so runs that
    differ only in them share one compiled step. AdamW's decay is decoupled (Loshchilov & Hutter 2019):
    p <- p - rate * multiple * (direction + decay * p). Frozen parameters take no part in the norm.
    """
    tx = transform(options)
    rise = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
    schedule = optax.join_schedules([rise, SCHEDULES[options.schedule](total - warmup)], [warmup])

    def update(
        grads: Any, opt_state: Any, params: Any, step: jax.Array, scalars: Mapping[str, jax.Array]
    ) -> tuple[Any, Any, jax.Array]:
        def move(keys: tuple[Any, ...], param: jax.Array, direction: jax.Array) -> jax.Array:
            multiple, decay, frozen = rule_of(path_of(keys), options)
            if frozen:
                return param
            weight = scalars["weight_decay"] if decay is None else decay
            return param - rate * multiple * (direction + weight * param)

        def live(keys: tuple[Any, ...], grad: jax.Array) -> jax.Array:
            return jnp.zeros_like(grad) if rule_of(path_of(keys), options)[2] else grad

        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            rate = scalars["learning_rate"] * schedule(step)
            grads = jax.tree_util.tree_map_with_path(live, grads)
            norm = optax.tree.norm(grads)
            directions, opt_state = tx.update(grads, opt_state, params)
            params = jax.tree_util.tree_map_with_path(move, params, directions)
        return params, opt_state, norm

    return update


def rule_of(path: str, options: Optimizer) -> tuple[float, float | None, bool]:
    """(learning-rate multiple, weight decay or None for the global one, frozen); first match wins."""
    for pattern, multiple, decay, frozen in options.rules:
        if re.search(pattern, path):
            return multiple, decay, frozen
    return 1.0, None, False


def ema_names(options: Optimizer) -> dict[str, float]:
    """Name -> decay of the averages that are kept."""
    return {f"{decay:g}": decay for decay in options.ema}


def ema_update(average: Any, new: Any, decay: float) -> Any:
    """average <- decay * average + (1 - decay) * new, in float32, every step (starts as a copy)."""
    return jax.tree.map(lambda a, n: a + (1.0 - decay) * (n - a), average, new)
