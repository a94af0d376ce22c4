"""The update: gradient transform, schedule, per-parameter rules, and moving averages of the weights."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scaling import models
from scaling.errors import UserError
from scaling.parallel.sharding import path_of
from scaling.run import layer_decay, muon
from scaling.run.options import Optimizer, ParamRule

OPTIMIZERS: dict[str, Callable[[Optimizer], optax.GradientTransformation]] = {
    "adamw": lambda options: optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps),
    "sgd": lambda options: optax.trace(decay=options.b1),
    "muon": lambda options: muon.scale_by_muon(),
}

# Schedules of the rate after the warm-up, as a share of its peak, over the steps that remain.
SCHEDULES: dict[str, Callable[[Optimizer, int, Sequence[int], int], optax.Schedule]] = {
    "constant": lambda options, steps, milestones, cooldown: optax.constant_schedule(1.0),
    "cosine": lambda options, steps, milestones, cooldown: optax.cosine_decay_schedule(
        1.0, max(steps, 1), options.final_lr_ratio
    ),
    "step": lambda options, steps, milestones, cooldown: optax.piecewise_constant_schedule(
        1.0, dict.fromkeys(milestones, 0.1)
    ),
    "wsd": lambda options, steps, milestones, cooldown: optax.join_schedules(
        [optax.constant_schedule(1.0), _cooldown(options.final_lr_ratio, cooldown)], [steps - cooldown]
    ),
}

Update = Callable[[Any, Any, Any, jax.Array, Mapping[str, jax.Array]], tuple[Any, Any, jax.Array, jax.Array]]


def _cooldown(final: float, steps: int) -> optax.Schedule:
    """Returns a decay from 1 by the root of the share of `steps` that is over (Hägele et al. 2024, eq. 2)."""

    def rate(step: jax.Array) -> jax.Array:
        return 1.0 - (1.0 - final) * jnp.sqrt(jnp.clip(step / steps, 0.0, 1.0))

    return rate


def transform(options: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Returns the transform from gradients to directions: clipping, L2 if enabled, then the optimiser's own.

    Parameters whose rule names another optimiser have that one's direction and state. The learning rate and
    the decoupled decay are applied later, in `make_update`.
    """
    clip = (
        optax.identity()
        if options.grad_clip_norm is None
        else optax.clip_by_global_norm(options.grad_clip_norm)
    )
    l2 = [_l2(options)] if options.weight_decay_mode == "l2" else []
    names = {options.name, *(rule.optimizer for rule in options.param_rules if rule.optimizer)}
    directions = {name: OPTIMIZERS[name](options) for name in sorted(names)}
    if len(directions) == 1:
        return optax.chain(clip, *l2, directions[options.name])

    def names_of(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: rule_of(path_of(keys), options).optimizer or options.name, params
        )

    return optax.chain(clip, *l2, optax.partition(directions, names_of))


def _l2(options: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Returns the transform that adds the gradient of decay / 2 |p|^2.

    Its `update` takes the global decay as `weight_decay`.
    """

    def update(grads: Any, state: Any, params: Any, *, weight_decay: jax.Array, **_: Any) -> tuple[Any, Any]:
        def add(keys: tuple[Any, ...], grad: jax.Array, param: jax.Array) -> jax.Array:
            rule = rule_of(path_of(keys), options)
            decay = weight_decay if rule.weight_decay is None else rule.weight_decay
            return grad if rule.frozen else grad + decay * param

        return jax.tree_util.tree_map_with_path(add, grads, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_update(
    options: Optimizer,
    warmup: int,
    total: int,
    milestones: Sequence[int] = (),
    cooldown: int = 0,
    rates: Callable[[Any], Any] | None = None,
) -> Update:
    """Returns `update(grads, opt_state, params, step, traced_hparams) -> (params, opt_state, norm, rate)`.

    The norm is the gradient's, before it is clipped, and the rate is the step's, without any factors.

    `warmup` and `milestones` are steps from the start of the run, which has `total` steps, and `cooldown` is
    the number of steps before its end. The rate and the decay are in `traced_hparams` ("learning_rate",
    "weight_decay"), so that runs that differ only in them share one compiled step. AdamW's decay is
    decoupled (Loshchilov & Hutter 2019): p <- p - rate * lr_scale * (direction + decay * p). Frozen
    parameters do not count in the norm. `rates` maps the parameters to factors of their directions, which the
    decay does without: what is decayed of a parameter then depends on no width.
    """
    tx = transform(options)
    warmup_schedule = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
    main_schedule = SCHEDULES[options.schedule](
        options, total - warmup, [milestone - warmup for milestone in milestones], cooldown
    )
    schedule = optax.join_schedules([warmup_schedule, main_schedule], [warmup])
    l2, layered = options.weight_decay_mode == "l2", options.layer_decay != 1.0

    def update(
        grads: Any, opt_state: Any, params: Any, step: jax.Array, traced_hparams: Mapping[str, jax.Array]
    ) -> tuple[Any, Any, jax.Array, jax.Array]:
        def move(
            keys: tuple[Any, ...], param: jax.Array, direction: jax.Array, multiple: Any, factor: Any
        ) -> jax.Array:
            rule = rule_of(path_of(keys), options)
            direction = direction * factor
            if rule.frozen:
                return param
            layer_rate = rate * multiple if layered else rate
            if l2:  # the direction has the decay already
                return param - layer_rate * rule.lr_scale * direction
            decay = traced_hparams["weight_decay"] if rule.weight_decay is None else rule.weight_decay
            return param - layer_rate * rule.lr_scale * (direction + decay * param)

        def zero_if_frozen(keys: tuple[Any, ...], grad: jax.Array) -> jax.Array:
            return jnp.zeros_like(grad) if rule_of(path_of(keys), options).frozen else grad

        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            rate = traced_hparams["learning_rate"] * schedule(step)
            grads = jax.tree_util.tree_map_with_path(zero_if_frozen, grads)
            norm = optax.tree.norm(grads)
            directions, opt_state = tx.update(
                grads, opt_state, params, weight_decay=traced_hparams["weight_decay"]
            )
            ones = jax.tree.map(lambda _: 1.0, params)
            multiples = layer_decay.multiples(params, options.layer_decay) if layered else ones
            of_width = ones if rates is None else rates(params)
            params = jax.tree_util.tree_map_with_path(move, params, directions, multiples, of_width)
        return params, opt_state, norm, rate

    return update


@functools.cache
def rule_of(path: str, options: Optimizer) -> ParamRule:
    """Returns the first rule that selects the parameter at `path`, or one that changes nothing."""
    return next((rule for rule in options.param_rules if _selects(rule, path)), ParamRule(".*"))


def _selects(rule: ParamRule, path: str) -> bool:
    of_role = rule.role is None or models.role_of(path).kind == rule.role
    return of_role and re.search(rule.match, path) is not None


def check_rules(options: Optimizer, params: Any) -> None:
    """Checks that every rule selects some parameter (or shape), and one for Muon matrices alone.

    Raises:
        UserError: for a rule that does not.
    """
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    for i, rule in enumerate(options.param_rules):
        if not any(_selects(rule, path) for path in paths):
            of_role = f" of role {rule.role}" if rule.role else ""
            raise UserError(
                f"optimizer.param_rules[{i}].match={rule.match!r}: matches no parameter{of_role} of the "
                f"model, such as {paths[0]}; correct the rule, or leave it out"
            )
    for path in paths:
        rule = rule_of(path, options)
        if rule.optimizer == "muon" and models.role_of(path).kind != "matrix":
            place = f"optimizer.param_rules[{options.param_rules.index(rule)}].optimizer='muon'"
            raise UserError(f"{place}: takes matrices, and {path} is none; add role='matrix' to the rule")


def ema_names(options: Optimizer) -> dict[str, float]:
    """Returns the decays of the moving averages, by the averages' names."""
    return {f"{decay:g}": decay for decay in options.ema_decays}


def ema_update(average: Any, new: Any, decay: float) -> Any:
    """Returns decay * average + (1 - decay) * new, in float32: every step, from an average that is a copy."""
    return jax.tree.map(lambda a, n: a + (1.0 - decay) * (n - a), average, new)
