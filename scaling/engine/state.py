"""The training state, born sharded, and the one jitted step that moves it."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax.sharding import NamedSharding, PartitionSpec

from scaling.engine import optimizer, sharding, tracing
from scaling.engine.build import Built, init_variables
from scaling.objectives.base import Extras
from scaling.randomness import stream

Step = Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]


@flax.struct.dataclass
class State:
    """Everything that training changes; all arrays float32 but the step and the optimiser's counter."""

    step: Any  # [] int32, updates taken (or, in a tree of shardings, where it lives; so for all)
    params: Any
    collections: Any  # what is not trained, such as BatchNorm's statistics
    opt_state: Any
    ema: dict[str, Any]  # name -> {"params": ..., "collections": ...}, averaged alike


def scalars(built: Built) -> dict[str, jax.Array]:
    """The numbers that sweeps vary, as arguments of the step: runs that differ only here share its code."""
    return jax.device_put(numbers(built), NamedSharding(built.mesh, PartitionSpec()))


def numbers(built: Built) -> dict[str, jax.Array]:
    """The same, on no mesh."""
    config = built.config
    values: dict[str, jax.Array] = {
        "seed": jnp.asarray(config.train.seed, jnp.int32),
        "learning_rate": jnp.asarray(config.optimizer.learning_rate, jnp.float32),
        "weight_decay": jnp.asarray(config.optimizer.weight_decay, jnp.float32),
    }
    if "label_dropout" in config.objective.options:
        dropout = config.objective.options["label_dropout"]
        values["label_dropout"] = jnp.asarray(dropout, jnp.float32)
    return values


def _init(built: Built, seed: jax.Array) -> State:
    variables = unfreeze(init_variables(built, stream(jax.random.key(seed), "init")))
    params = variables.pop("params")
    averaged = {"params": params, "collections": variables}
    options = built.config.optimizer
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        collections=variables,
        opt_state=optimizer.transform(options).init(params),
        ema={name: jax.tree.map(jnp.copy, averaged) for name in optimizer.ema_names(options)},
    )


def with_weights(fresh: State, params: Any, collections: Any) -> State:
    """`fresh` with these weights, from which its averages begin; what the trees leave out stays as it is."""
    new = {
        "params": _replaced(fresh.params, params),
        "collections": _replaced(fresh.collections, collections),
    }
    averages = {name: jax.tree.map(jnp.copy, new) for name in fresh.ema}
    return fresh.replace(**new, ema=averages)  # type: ignore[attr-defined]


def _replaced(old: Any, new: Any) -> Any:
    """`old` with the leaves that `new` has: arrays of their own, of the types and in the places of `old`."""
    if isinstance(old, Mapping):
        return {key: _replaced(value, new[key]) if key in new else value for key, value in old.items()}
    return jax.device_put(jnp.array(new, old.dtype), old.sharding)


@lru_cache(maxsize=2)
def abstract(built: Built) -> State:
    """The state's shapes, each with its sharding: what initialising and restoring fill in."""
    shapes = jax.eval_shape(lambda: _init(built, jnp.zeros((), jnp.int32)))
    placed = shardings(built, shapes)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)


def shardings(built: Built, shapes: State) -> State:
    """Where each array of the state lives: optimiser and averages as the parameters they belong to."""
    mesh = built.mesh
    params = sharding.param_shardings(shapes.params, mesh)
    collections = sharding.replicated(shapes.collections, mesh)
    tx = optimizer.transform(built.config.optimizer)
    return State(
        step=NamedSharding(mesh, PartitionSpec()),
        params=params,
        collections=collections,
        opt_state=sharding.optimizer_shardings(tx, shapes.opt_state, params, mesh),
        ema={name: {"params": params, "collections": collections} for name in shapes.ema},
    )


def initialiser(built: Built) -> Any:
    """`seed -> State`, jitted: each device makes only its own shards."""
    placed = jax.tree.map(lambda s: s.sharding, abstract(built))
    return jax.jit(lambda seed: _init(built, seed), out_shardings=placed)


def init(built: Built) -> State:
    """A fresh state, born where it will live."""
    return initialiser(built)(scalars(built)["seed"])


def make_step(built: Built) -> Step:
    """`step(state, batch, scalars) -> (state, metrics)`: jitted, the state donated, averages inside.

    Metrics are the objective's, over the global batch, with `loss` and `grad_norm`.
    """
    options, task = built.config.optimizer, built.task
    warmup = built.steps_of(options.warmup, "optimizer.warmup")
    drops = [built.steps_of(drop, "optimizer.drops") for drop in options.drops]
    update = optimizer.make_update(options, warmup, built.steps, drops)
    decays = optimizer.ema_names(options)

    def step(
        state: State, batch: Any, scalars: Mapping[str, jax.Array]
    ) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(stream(jax.random.key(scalars["seed"]), "step"), state.step)
        extras = Extras(collections=state.collections, ema=state.ema, scalars=scalars)

        def loss(params: Any) -> Any:
            params = tracing.gathered(built.mesh, params)
            result = task.loss(params, extras, batch, rng, train=True)
            return result.value, result

        grads, result = jax.grad(loss, has_aux=True)(state.params)
        params, opt_state, norm = update(grads, state.opt_state, state.params, state.step, scalars)
        params = task.bounded(params) if hasattr(task, "bounded") else params
        collections = {**state.collections, **result.collections}
        new = {"params": params, "collections": collections}
        ema = {name: optimizer.ema_update(state.ema[name], new, decay) for name, decay in decays.items()}
        metrics = {name: result.sums[name] / result.counts[name] for name in result.sums}
        metrics |= {"loss": result.value, "grad_norm": norm}
        return State(state.step + 1, params, collections, opt_state, ema), metrics

    placed = jax.tree.map(lambda s: s.sharding, abstract(built))
    whole = NamedSharding(built.mesh, PartitionSpec())
    return jax.jit(tracing.on(built.mesh, step), donate_argnums=0, out_shardings=(placed, whole))


def inference(state: State) -> dict[str, Any]:
    """{"params", "collections"} to evaluate with: the first average where there is one."""
    for average in state.ema.values():
        return average
    return {"params": state.params, "collections": state.collections}
