"""Where arrays live: one mesh, and path rules that cut parameters over it.

A rule names, for a parameter path, which dimensions (counted from the end, so that the stacked layer
dimension does not shift them) each mesh axis may cut, in order of preference. The first rule whose
pattern matches wins. Axes that divide none of their dimensions leave the array whole along them.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec
from optax.tree_utils import tree_map_params

from scaling.engine import config as configs
from scaling.engine.config import AXES
from scaling.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))
SMALL = 64 * 1024  # bytes; an array below this is replicated

# What a model calls its activations' dimensions -> mesh axes; of one array the first that can be cut is.
ACTIVATIONS: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("space_time", "tensor"),  # the tokens of joint attention over a video, which are many
    ("token", None),
    ("embed", None),
)


@dataclass(frozen=True)
class Rule:
    """Parameters whose path matches `pattern` may be cut along these dimensions."""

    pattern: str
    fsdp: tuple[int, ...] = ()
    tensor: tuple[int, ...] = ()


# A dense kernel is [..., in, out], an attention kernel [..., D, heads, width] or [..., heads, width, D].
RULES: tuple[Rule, ...] = (
    Rule(r"attention/(query|key|value)/kernel$", fsdp=(-3,), tensor=(-2,)),
    Rule(r"attention/(query|key|value)/bias$", tensor=(-2,)),
    Rule(r"attention/out/kernel$", fsdp=(-1,), tensor=(-3,)),
    Rule(r"mlp/(up|gate)/kernel$", fsdp=(-2,), tensor=(-1,)),
    Rule(r"mlp/(up|gate)/bias$", tensor=(-1,)),
    Rule(r"mlp/down/kernel$", fsdp=(-1,), tensor=(-2,)),
    Rule(r"modulation/kernel$", fsdp=(-2,), tensor=(-1,)),
    Rule(r"embedding$", fsdp=(-2, -1), tensor=(-1,)),
    Rule(r"kernel$", fsdp=(-1, -2), tensor=()),
    Rule(r"(positions|token)$", fsdp=(-1,)),
    Rule(r"(bias|scale)$"),
)


def make_mesh(options: configs.Mesh, devices: Iterable[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The (data, fsdp, tensor) mesh over all devices; one device is the 1 x 1 x 1 mesh."""
    found = list(devices) if devices is not None else jax.devices()
    sizes = options.over(len(found))
    if sizes is None:
        raise UserError(
            f"mesh.data={options.data}, mesh.fsdp={options.fsdp}, mesh.tensor={options.tensor}: "
            f"must multiply to the {len(found)} devices (one may be -1)"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(arranged(tuple(sizes.values()), found), AXES, axis_types=auto)


def arranged(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices as [data, fsdp, tensor], neighbours close together.

    Slices of TPUs, between which the network is slow, are apart along data alone.

    Raises: UserError where data is no multiple of the slices.
    """
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    if slices <= 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]}: must be a multiple of the {slices} slices: fsdp and tensor lie within one"
        )
    within = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def batch_sharding(mesh: jax.sharding.Mesh, batch_size: int, key: str) -> NamedSharding:
    """Batches are cut over data x fsdp; raises UserError (naming `key`) where that does not divide."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise UserError(f"{key}={batch_size}: must be a multiple of mesh data x fsdp = {ways}")
    return NamedSharding(mesh, BATCH)


def rule_of(path: str) -> Rule:
    """The first rule that matches; raises UserError if none does."""
    rule = next((r for r in RULES if re.search(r.pattern, path)), None)
    if rule is None:
        raise UserError(f"parameter {path}: no sharding rule matches; add one to engine.sharding.RULES")
    return rule


def spec(path: str, shape: tuple[int, ...], itemsize: int, mesh: Mapping[str, int]) -> PartitionSpec:
    """How the parameter at `path` is cut; `mesh` maps axis to size.

    Raises:
        UserError: if no rule matches the path.
    """
    rule = rule_of(path)
    cut: list[str | None] = [None] * len(shape)
    if math.prod(shape) * itemsize < SMALL:
        return PartitionSpec()
    for axis, dims in (("tensor", rule.tensor), ("fsdp", rule.fsdp)):
        free = (d for d in dims if -d <= len(shape) and cut[d] is None and shape[d] % mesh[axis] == 0)
        dim = next(free, None)
        if dim is not None and mesh[axis] > 1:
            cut[dim] = axis
    return PartitionSpec(*cut)


def path_of(keys: tuple[Any, ...]) -> str:
    """A tree path as "blocks/attention/query/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def param_shardings(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """The same tree with a NamedSharding for each array (or ShapeDtypeStruct)."""
    sizes = dict(mesh.shape)

    def one(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(path_of(keys), leaf.shape, leaf.dtype.itemsize, sizes))

    return jax.tree_util.tree_map_with_path(one, params)


def optimizer_shardings(tx: Any, opt_state: Any, shardings: Any, mesh: jax.sharding.Mesh) -> Any:
    """The optimiser's state is cut as the parameters that it belongs to; counters are replicated."""
    whole = NamedSharding(mesh, PartitionSpec())
    return tree_map_params(tx, lambda _, s: s, opt_state, shardings, transform_non_params=lambda _: whole)


def replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def uncut(params: Any, mesh: jax.sharding.Mesh) -> list[str]:
    """What is to be said of a mesh: large parameters that an axis should cut and does not; small ones."""
    sizes = {axis: mesh.shape[axis] for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1}
    said, small = [], 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        if math.prod(leaf.shape) * leaf.dtype.itemsize < SMALL:
            small += 1
            continue
        cut = spec(path, leaf.shape, leaf.dtype.itemsize, dict(mesh.shape))
        for axis, size in sizes.items():
            if getattr(rule_of(path), axis) and axis not in cut:
                said.append(f"{path} is whole along {axis}={size}, which divides none of its {leaf.shape}")
    if small and sizes:
        said.append(f"{small} arrays under {SMALL // 1024} KiB are whole everywhere")
    return said
