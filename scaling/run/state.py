"""The training state, sharded from the start, and the one jitted step that updates it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from scaling.objectives.base import NO_HELPERS, Bounded, Extras, Helpers
from scaling.parallel import sharding, tracing
from scaling.randomness import derive_key
from scaling.run import mup, optimizer
from scaling.run.build import Run, init_variables, shared_by_runs
from scaling.run.checkpoint_reading import LEFT_OUT
from scaling.run.options import Optimizer

Step = Callable[..., tuple[Any, dict[str, jax.Array]]]


@flax.struct.dataclass
class State:
    """Everything that training changes; arrays are float32, but for the step and the optimiser's counter.

    A tree of shapes or of shardings has the same fields.
    """

    step: Any  # [] int32, number of updates taken
    params: Any
    collections: Any  # arrays that are not trained, such as BatchNorm's statistics
    opt_state: Any
    ema: dict[str, Any]  # name -> {"params": ..., "collections": ...}, moving averages of both


def traced_hparams(run: Run) -> dict[str, jax.Array]:
    """Returns the numbers that sweeps vary, as arguments of the step, replicated on the run's mesh."""
    return jax.device_put(hparam_values(run), NamedSharding(run.mesh, PartitionSpec()))


def hparam_values(run: Run) -> dict[str, jax.Array]:
    """Returns the same numbers as `traced_hparams`, the values of `build.TRACED` keys, on no mesh."""
    config = run.config
    values: dict[str, jax.Array] = {
        "seed": jnp.asarray(config.train.seed, jnp.int32),
        "learning_rate": jnp.asarray(config.optimizer.learning_rate, jnp.float32),
        "weight_decay": jnp.asarray(config.optimizer.weight_decay, jnp.float32),
    }
    if "condition_dropout" in config.objective.options:
        dropout = config.objective.options["condition_dropout"]
        values["condition_dropout"] = jnp.asarray(dropout, jnp.float32)
    return values


def _init(run: Run, seed: jax.Array) -> State:
    key = derive_key(jax.random.key(seed), "init")
    variables = unfreeze(init_variables(run, key))
    variables["params"] = mup.initialised(run, variables["params"], key)
    return _first_state(run.config.optimizer, variables)


def _first_state(options: Optimizer, variables: Mapping[str, Any]) -> State:
    collections = dict(variables)
    params = collections.pop("params")
    averaged = {"params": params, "collections": collections}
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        collections=collections,
        opt_state=optimizer.transform(options).init(params),
        ema={name: jax.tree.map(jnp.copy, averaged) for name in optimizer.ema_names(options)},
    )


def with_weights(fresh: State, params: Any, collections: Any) -> State:
    """Returns `fresh` with these weights, also as the start of its averages.

    Arrays that the trees leave out stay as they are.
    """
    new = {
        "params": _replace_leaves(fresh.params, params),
        "collections": _replace_leaves(fresh.collections, collections),
    }
    averages = {name: jax.tree.map(_copy, new, new) for name in fresh.ema}
    return fresh.replace(**new, ema=averages)  # type: ignore[attr-defined]


def _replace_leaves(old: Any, new: Any) -> Any:
    """Returns `old` with copies of the leaves that `new` has, in the types and shardings of `old`."""
    if isinstance(old, Mapping):
        return {key: _replace_leaves(value, new[key]) if key in new else value for key, value in old.items()}
    return _copy(new, old)


def _copy(array: Any, like: Any) -> jax.Array:
    """Returns a copy in the type and sharding of `like`; nothing is compiled."""
    return jax.device_put(jnp.asarray(array, like.dtype), like.sharding, may_alias=False)


@shared_by_runs
def abstract(run: Run) -> State:
    """Returns the state's shapes, each with its sharding; initialising and restoring fill them in."""
    shapes = jax.eval_shape(partial(_first_state, run.config.optimizer), run.variable_shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings(run, shapes)
    )


def shardings(run: Run, shapes: State) -> State:
    """Returns the sharding of each array: optimiser and averages are sharded as their parameters are."""
    mesh = run.mesh
    params = sharding.param_shardings(shapes.params, mesh)
    collections = sharding.replicated(shapes.collections, mesh)
    tx = optimizer.transform(run.config.optimizer)
    return State(
        step=NamedSharding(mesh, PartitionSpec()),
        params=params,
        collections=collections,
        opt_state=sharding.optimizer_shardings(tx, shapes.opt_state, params, mesh),
        ema={name: {"params": params, "collections": collections} for name in shapes.ema},
    )


@shared_by_runs
def initialiser(run: Run) -> Any:
    """Returns the jitted function `seed -> State`, in which each device makes only its own shards."""
    out_shardings = jax.tree.map(lambda s: s.sharding, abstract(run))
    return jax.jit(lambda seed: _init(run, seed), out_shardings=out_shardings)


def init(run: Run) -> State:
    """Returns a fresh state, each array initialised directly in its sharding."""
    return initialiser(run)(traced_hparams(run)["seed"])


def init_from(run: Run, params: Any, collections: Any) -> State:
    """Returns a fresh state with these weights; those that the trees leave out are initialised.

    If none are left out, nothing is drawn.
    """
    like = abstract(run)
    every: Any = {"params": like.params, **like.collections}
    given: Any = {"params": params, **collections}
    if flatten_dict(every).keys() - flatten_dict(given).keys():
        return with_weights(init(run), params, collections)
    start: Callable[[Any], State] = _start(run)
    return start(_replace_leaves(every, given))


@shared_by_runs
def _start(run: Run) -> Any:
    """Returns the jitted function of a run's variables, which it takes over, to its state of step 0."""
    out_shardings = jax.tree.map(lambda s: s.sharding, abstract(run))
    first = partial(_first_state, run.config.optimizer)
    return jax.jit(first, out_shardings=out_shardings, donate_argnums=0)


@shared_by_runs
def make_step(run: Run) -> Step:
    """Returns `step(state, batch, traced_hparams, helpers) -> (state, metrics)`, jitted.

    Runs that differ only in `traced_hparams` share it. The state is donated. The step updates the averages
    too. Metrics are the objective's, over the global batch, with `loss`, `grad_norm` and
    `learning_rate`, the rate of this step.

    Raises:
        UserError: if a rule of the optimiser matches no parameter.
    """
    options, objective = run.config.optimizer, run.objective
    optimizer.check_rules(options, run.variable_shapes["params"])
    warmup = run.steps_of(options.warmup, "optimizer.warmup")
    milestones = [run.steps_of(milestone, "optimizer.lr_milestones") for milestone in options.lr_milestones]
    cooldown = run.steps_of(options.cooldown, "optimizer.cooldown") if options.cooldown else 0
    rates = partial(mup.rates, run) if options.mup_base else None
    update = optimizer.make_update(options, warmup, run.steps, milestones, cooldown, rates)
    decays = optimizer.ema_names(options)

    def step(
        state: State, batch: Any, traced_hparams: Mapping[str, jax.Array], helpers: Helpers = NO_HELPERS
    ) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(derive_key(jax.random.key(traced_hparams["seed"]), "step"), state.step)
        extras = Extras(state.collections, traced_hparams, helpers)

        def loss(params: Any) -> Any:
            params = tracing.gather_unstacked(run.mesh, params)
            result = objective.loss(params, extras, batch, rng, train=True)
            return result.value, result

        grads, result = jax.grad(loss, has_aux=True)(state.params)
        params, opt_state, norm, rate = update(
            grads, state.opt_state, state.params, state.step, traced_hparams
        )
        params = objective.bounded(params) if isinstance(objective, Bounded) else params
        collections = {**state.collections, **result.collections}
        new = {"params": params, "collections": collections}
        ema = {name: optimizer.ema_update(state.ema[name], new, decay) for name, decay in decays.items()}
        metrics = {name: result.sums[name] / result.counts[name] for name in result.sums}
        metrics |= {"loss": result.value, "grad_norm": norm, "learning_rate": rate}
        return State(state.step + 1, params, collections, opt_state, ema), metrics

    state_shardings = jax.tree.map(lambda s: s.sharding, abstract(run))
    replicated = NamedSharding(run.mesh, PartitionSpec())
    return jax.jit(
        tracing.trace_on_mesh(run.mesh, step),
        donate_argnums=0,
        out_shardings=(state_shardings, replicated),
    )


def not_finite(run: Run, state: State) -> list[str]:
    """Returns the paths of the state's arrays that hold a NaN or an infinity."""
    paths = [sharding.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    finite = jax.device_get(_finite(run)(state))
    return [path for path, fine in zip(paths, finite, strict=True) if not fine]


@shared_by_runs
def _finite(run: Run) -> Callable[[State], list[jax.Array]]:
    def finite(state: State) -> list[jax.Array]:
        return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]

    return jax.jit(finite, out_shardings=NamedSharding(run.mesh, PartitionSpec()))


def only_eval_weights(shapes: State) -> State:
    """Returns `shapes` with LEFT_OUT for all that `eval_weights` does not return."""
    wanted = {id(leaf) for leaf in jax.tree.leaves(eval_weights(shapes))}
    return jax.tree.map(lambda leaf: leaf if id(leaf) in wanted else LEFT_OUT, shapes)


def eval_weights(state: State) -> dict[str, Any]:
    """Returns {"params", "collections"} to evaluate: the first average, if there is one."""
    for average in state.ema.values():
        return average
    return {"params": state.params, "collections": state.collections}
