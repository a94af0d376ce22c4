"""The maximal update parametrisation: rates and initial values by which widths share one learning rate.

Yang et al. 2022 (arXiv:2203.03466, table 3, for Adam), which Zheng et al. 2025 (arXiv:2505.15270) show to
hold for diffusion transformers. A model is compared with a base of the same family whose options differ in
width alone; where a dimension of a parameter is m times the base's:

| parameter | initial spread, in units of the base's | rate |
| hidden matrix, of fan-in and fan-out | m_in^-1/2 | 1 / m_in |
| output matrix, of fan-in alone | 1 / m_in | 1 / m_in |
| input matrix, table, positions, vector | 1 | 1 |

Logits of attention are divided by the width of a head in place of its root: the queries carry the factor.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from scaling import models
from scaling.errors import UserError
from scaling.parallel.sharding import path_of
from scaling.run import config as run_config
from scaling.run.build import Run, build, init_variables, shared_by_runs
from scaling.run.options import parse_mup_base

QUERY, QUERY_NORM = re.compile(r"\bquery/(kernel|bias)$"), "norm_query/scale"  # parameters of queries


@dataclass(frozen=True)
class Factors:
    """Factors of one parameter: of the base's initial spread, None where its own stays; and of the rate."""

    init: float | None
    rate: float


def factors(shapes: Any, base_shapes: Any) -> dict[str, Factors]:
    """Returns the factors of each parameter by its path, given its shape and that of the base.

    Raises:
        UserError: if the base has other parameters, or one of another rank or number of layers.
    """
    mine, base = _by_path(shapes), _by_path(base_shapes)
    if mine.keys() != base.keys():
        other = min(mine.keys() ^ base.keys())
        raise UserError(
            f"optimizer.mup_base: only one of the model and its base has {other}; change the width alone"
        )
    queries = {}
    for path in filter(QUERY.search, mine):  # LayerNorm undoes what the kernel carries: its scale carries it
        norm = QUERY.sub(QUERY_NORM, path)
        queries[norm if norm in mine else path] = math.sqrt(base[path].shape[-1] / mine[path].shape[-1])
    return {
        path: _factors(path, leaf.shape, base[path].shape, queries.get(path, 1.0))
        for path, leaf in mine.items()
    }


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _factors(path: str, shape: tuple[int, ...], base: tuple[int, ...], query: float) -> Factors:
    """Returns the factors of one parameter; `query` is 1, or what queries carry."""
    role = models.role_of(path)
    if len(shape) != len(base) or (role.stacked and shape[0] != base[0]):
        raise UserError(
            f"optimizer.mup_base: {path} has shape {shape}, and in the base {base}; change the width alone"
        )
    first = int(role.stacked)
    inputs = slice(first, first + len(role.fan_in))
    into = math.prod(shape[inputs]) / math.prod(base[inputs])
    out = math.prod(shape[inputs.stop :]) / math.prod(base[inputs.stop :])
    if role.kind in ("table", "positions"):
        return Factors(1.0, 1.0)
    if role.kind == "vector":
        return Factors(query if query != 1 else None, query)
    return Factors(query * (into**-0.5 if out != 1 else 1 / into), query / into)


@shared_by_runs
def base_of(run: Run) -> Run:
    """Returns the run of the base.

    Raises:
        UserError: if `optimizer.mup_base` has other options than the model.
    """
    options = parse_mup_base(run.config.optimizer.mup_base)
    values = {f"model.{key}": value for key, value in options.items()}
    known = run.config.raw["model"]
    for key in options:
        if key not in known:
            raise UserError(
                f"optimizer.mup_base={run.config.optimizer.mup_base!r}: {key} is no option of the model"
            )
    changed = run_config.changed(run.config, {**values, "optimizer.mup_base": ""})
    return build(changed, info=run.info, mesh=run.mesh)


@shared_by_runs
def _of_run(run: Run) -> dict[str, Factors]:
    return factors(run.variable_shapes["params"], base_of(run).variable_shapes["params"])


def rates(run: Run, params: Any) -> Any:
    """Returns the factor of the learning rate of each parameter."""
    of_path = _of_run(run)
    return jax.tree_util.tree_map_with_path(lambda keys, _: of_path[path_of(keys)].rate, params)


def initialised(run: Run, params: Any, key: jax.Array) -> Any:
    """Returns initial parameters with the spreads of the parametrisation, by those of a base drawn alike."""
    if not run.config.optimizer.mup_base:
        return params
    of_path, base = _of_run(run), _by_path(init_variables(base_of(run), key)["params"])

    def scaled(keys: tuple[Any, ...], param: jax.Array) -> jax.Array:
        path = path_of(keys)
        factor = of_path[path].init
        if factor is None:
            return param
        own = jnp.sqrt(jnp.mean(param**2))
        wanted = factor * jnp.sqrt(jnp.mean(base[path] ** 2))
        return jnp.where(own > 0, param * (wanted / jnp.maximum(own, 1e-30)), param)

    return jax.tree_util.tree_map_with_path(scaled, params)
