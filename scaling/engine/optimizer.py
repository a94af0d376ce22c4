"""The update: gradient transform, schedule, per-parameter rules, and averages of the weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scaling.engine import depth
from scaling.engine.config import Optimizer
from scaling.engine.sharding import path_of

OPTIMIZERS: dict[str, Callable[[Optimizer], optax.GradientTransformation]] = {
    "adamw": lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
    "sgd": lambda o: optax.trace(decay=o.b1),
}

# What follows the warm-up, as a share of the peak rate: over the steps that remain, or with drops at some.
SCHEDULES: dict[str, Callable[[Optimizer, int, Sequence[int]], optax.Schedule]] = {
    "constant": lambda o, steps, drops: optax.constant_schedule(1.0),
    "cosine": lambda o, steps, drops: optax.cosine_decay_schedule(1.0, max(steps, 1), o.floor),
    "step": lambda o, steps, drops: optax.piecewise_constant_schedule(1.0, dict.fromkeys(drops, 0.1)),
}

Update = Callable[[Any, Any, Any, jax.Array, Mapping[str, jax.Array]], tuple[Any, Any, jax.Array]]


def transform(options: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Gradient to direction: clipping, L2 if asked for, then the optimiser without rate and decay."""
    clip = optax.identity() if options.clip is None else optax.clip_by_global_norm(options.clip)
    l2 = [_l2(options)] if options.decay == "l2" else []
    return optax.chain(clip, *l2, OPTIMIZERS[options.name](options))


def _l2(options: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of decay / 2 |p|^2; `update` takes the global decay as `weight_decay`."""

    def update(grads: Any, state: Any, params: Any, *, weight_decay: jax.Array, **_: Any) -> tuple[Any, Any]:
        def add(keys: tuple[Any, ...], grad: jax.Array, param: jax.Array) -> jax.Array:
            _, decay, frozen = rule_of(path_of(keys), options)
            return grad if frozen else grad + (weight_decay if decay is None else decay) * param

        return jax.tree_util.tree_map_with_path(add, grads, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_update(options: Optimizer, warmup: int, total: int, drops: Sequence[int] = ()) -> Update:
    """`update(grads, opt_state, params, step, scalars) -> (params, opt_state, gradient norm)`.

    `warmup` and `drops` are counted in steps from the start of the run, which has `total`. The rate and the
    decay come as traced `scalars` ("learning_rate", "weight_decay"), so runs that differ only in them share
    one compiled step. AdamW's decay is decoupled (Loshchilov & Hutter 2019):
    p <- p - rate * multiple * (direction + decay * p). Frozen parameters take no part in the norm.
    """
    tx = transform(options)
    rise = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
    after = SCHEDULES[options.schedule](options, total - warmup, [drop - warmup for drop in drops])
    schedule = optax.join_schedules([rise, after], [warmup])
    l2, layered = options.decay == "l2", options.layer_decay != 1.0

    def update(
        grads: Any, opt_state: Any, params: Any, step: jax.Array, scalars: Mapping[str, jax.Array]
    ) -> tuple[Any, Any, jax.Array]:
        def move(keys: tuple[Any, ...], param: jax.Array, direction: jax.Array) -> jax.Array:
            multiple, decay, frozen = rule_of(path_of(keys), options)
            if frozen:
                return param
            by_layer = rate * depth.multiple(keys, params, options.layer_decay) if layered else rate
            if l2:  # which is in the direction already
                return param - by_layer * multiple * direction
            weight = scalars["weight_decay"] if decay is None else decay
            return param - by_layer * multiple * (direction + weight * param)

        def live(keys: tuple[Any, ...], grad: jax.Array) -> jax.Array:
            return jnp.zeros_like(grad) if rule_of(path_of(keys), options)[2] else grad

        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            rate = scalars["learning_rate"] * schedule(step)
            grads = jax.tree_util.tree_map_with_path(live, grads)
            norm = optax.tree.norm(grads)
            directions, opt_state = tx.update(grads, opt_state, params, weight_decay=scalars["weight_decay"])
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
