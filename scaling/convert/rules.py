"""A foreign format as a table: which tensor becomes which array of a model, and how shapes change both ways.

Foreign tensors have names ("layers.0.fc.weight"), a model's arrays have paths ("params/blocks/fc/kernel").
Every rule only rearranges numbers, so that loading and then saving gives the same tensors bit for bit.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.traverse_util
import numpy as np

Array = np.ndarray
HUGE = 2**32  # numbers of a tensor, more than any model here has in one
FLOATS = "fV"  # NumPy's kinds of floats; bfloat16 is a V
Tensors = Mapping[str, Array]


@dataclass(frozen=True)
class Shape:
    """A conversion of one foreign array into the arrays of the model that it holds, and back."""

    load: Callable[[Array], tuple[Array, ...]]
    save: Callable[..., Array]


@dataclass(frozen=True)
class ConversionRule:
    """A rule for one foreign tensor, or for one tensor per layer where `name` holds "{i}".

    `paths` are paths in a model's variables ("params/patch/kernel"). With `layers`, the foreign tensors of
    these layers are stacked, in this order, on a leading axis. `copies` are further names of the same tensor,
    and `echoes` are further names that only some files have.
    """

    name: str
    paths: tuple[str, ...]
    shape: Shape
    layers: tuple[int, ...] | None = None
    copies: tuple[str, ...] = ()
    echoes: tuple[str, ...] = ()


Rules = list[ConversionRule]


# Shapes. Foreign kernels are PyTorch's: linear [out, in], convolution [out, in, ...].

SAME = Shape(lambda x: (x,), lambda x: x)
TRANSPOSED = Shape(lambda x: (x.T,), lambda x: x.T)
CONVOLUTION = Shape(  # [O, I, ...] <-> [..., I, O]
    lambda x: (np.moveaxis(x, (0, 1), (-1, -2)),), lambda x: np.moveaxis(x, (-1, -2), (0, 1))
)
LEADING = Shape(lambda x: (x.reshape(x.shape[1:]),), lambda x: x[None])  # [1, ...] <-> [...]


def reshaped(foreign: Sequence[int], native: Sequence[int]) -> Shape:
    """Returns the reshape between a foreign and a native shape; one size of each may be -1."""
    return Shape(lambda x: (x.reshape(native),), lambda x: x.reshape(foreign))


def patches(*sides: int) -> Shape:
    """Converts a patch embedding [D, C, *sides] <-> [prod(sides) * C, D], in the order of `patchify`."""

    def load(x: Array) -> tuple[Array]:
        return (np.moveaxis(x, (0, 1), (-1, -2)).reshape(-1, x.shape[0]),)

    def save(x: Array) -> Array:
        return np.moveaxis(x.reshape(*sides, -1, x.shape[-1]), (-1, -2), (0, 1))

    return Shape(load, save)


def split_heads(heads: int, parts: int = 1) -> Shape:
    """Converts [parts * heads * d, D] <-> `parts` kernels [D, heads, d]; a bias likewise <-> [heads, d]."""

    def load(x: Array) -> tuple[Array, ...]:
        pieces = np.split(x, parts)
        return tuple(
            p.T.reshape(p.shape[1], heads, -1) if p.ndim == 2 else p.reshape(heads, -1) for p in pieces
        )

    def save(*parts: Array) -> Array:
        flat = [p.reshape(len(p), -1).T if p.ndim == 3 else p.reshape(-1) for p in parts]
        return np.concatenate(flat)

    return Shape(load, save)


def side_by_side(parts: int) -> Shape:
    """Converts [parts * out, in] <-> `parts` kernels [in, out]; a bias likewise <-> [out]."""
    return Shape(
        lambda x: tuple(part.T for part in np.split(x, parts)), lambda *x: np.concatenate([p.T for p in x])
    )


def merged_heads(heads: int) -> Shape:
    """Converts the projection after attention, [D, heads * d] <-> [heads, d, D]."""
    return Shape(lambda x: (x.T.reshape(heads, -1, len(x)),), lambda x: x.reshape(-1, x.shape[-1]).T)


# Rules of layers: `name` is the foreign layer's name, `path` its path in the model's parameters.

Layers = Iterable[int] | None


def tensor(name: str, path: str, shape: Shape = SAME, layers: Layers = None) -> Rules:
    """Returns the rule for one array of the parameters."""
    return [ConversionRule(name, (f"params/{path}",), shape, None if layers is None else tuple(layers))]


def linear(
    name: str, path: str, layers: Layers = None, *, bias: bool = True, shape: Shape = TRANSPOSED
) -> Rules:
    """Returns the rules for a kernel that `shape` converts and, with `bias`, its bias."""
    layers = None if layers is None else tuple(layers)
    rules = tensor(f"{name}.weight", f"{path}/kernel", shape, layers)
    return rules + (tensor(f"{name}.bias", f"{path}/bias", SAME, layers) if bias else [])


def gated(name: str, path: str) -> Rules:
    """Returns the rules for the first layer of a gated MLP, one tensor with the values before the gates."""
    return [
        ConversionRule(
            f"{name}.{suffix}", (f"params/{path}/up/{leaf}", f"params/{path}/gate/{leaf}"), side_by_side(2)
        )
        for suffix, leaf in (("weight", "kernel"), ("bias", "bias"))
    ]


def convolution(name: str, path: str, layers: Layers = None, *, bias: bool = True) -> Rules:
    """Returns the rules for a convolution [O, I, ...] of any rank."""
    return linear(name, path, layers, bias=bias, shape=CONVOLUTION)


def norm(name: str, path: str, layers: Layers = None, *, bias: bool = True) -> Rules:
    """Returns the rules for a LayerNorm, GroupNorm or RMSNorm."""
    layers = None if layers is None else tuple(layers)
    rules = tensor(f"{name}.weight", f"{path}/scale", SAME, layers)
    return rules + (tensor(f"{name}.bias", f"{path}/bias", SAME, layers) if bias else [])


def batch_norm(name: str, path: str, layers: Layers = None) -> Rules:
    """Returns the rules for a BatchNorm with its running statistics, in the collection `batch_stats`."""
    layers = None if layers is None else tuple(layers)
    statistics = [
        ConversionRule(f"{name}.running_{statistic}", (f"batch_stats/{path}/{statistic}",), SAME, layers)
        for statistic in ("mean", "var")
    ]
    return norm(name, path, layers) + statistics


def attention(
    query: str,
    key: str,
    value: str,
    out: str,
    path: str,
    heads: int,
    layers: Layers = None,
    *,
    bias: bool = True,
) -> Rules:
    """Returns the rules for multi-head attention whose query, key and value are separate linear layers."""
    layers = None if layers is None else tuple(layers)
    rules: Rules = []
    for name, part in ((query, "query"), (key, "key"), (value, "value")):
        rules += tensor(f"{name}.weight", f"{path}/{part}/kernel", split_heads(heads), layers)
        if bias:
            rules += tensor(f"{name}.bias", f"{path}/{part}/bias", split_heads(heads), layers)
    return rules + linear(out, f"{path}/out", layers, bias=bias, shape=merged_heads(heads))


def fused_attention(
    weight: str, bias: str | None, out: str, path: str, heads: int, layers: Layers = None
) -> Rules:
    """Returns the rules for multi-head attention with query, key and value in one tensor [3D, D].

    `weight` and `bias` are the names of that tensor and of its bias.
    """
    layers = None if layers is None else tuple(layers)
    shape, parts = split_heads(heads, 3), ("query", "key", "value")
    rules = [ConversionRule(weight, tuple(f"params/{path}/{p}/kernel" for p in parts), shape, layers)]
    if bias is not None:
        rules.append(ConversionRule(bias, tuple(f"params/{path}/{p}/bias" for p in parts), shape, layers))
    return rules + linear(out, f"{path}/out", layers, shape=merged_heads(heads))


# Loading, saving and checking


def names(rule: ConversionRule) -> list[str]:
    """Returns the names of a rule's foreign tensors, one per layer, without copies."""
    return [rule.name] if rule.layers is None else [rule.name.format(i=i) for i in rule.layers]


def load(rules: Rules, tensors: Tensors) -> dict[str, Any]:
    """Returns variables {"params": ..., ...} from foreign tensors; every name must be present."""
    flat: dict[str, Array] = {}
    for rule in rules:
        per_layer = [rule.shape.load(tensors[name]) for name in names(rule)]
        for path, *parts in zip(rule.paths, *per_layer, strict=True):
            flat[path] = parts[0] if rule.layers is None else np.stack(parts)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def save(rules: Rules, variables: Mapping[str, Any]) -> dict[str, Array]:
    """Returns foreign tensors from variables: the inverse of `load`, copies included."""
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    tensors: dict[str, Array] = {}
    for rule in rules:
        parts = [np.asarray(flat[path]) for path in rule.paths]
        for row, name in enumerate(names(rule)):
            layer = parts if rule.layers is None else [p[row] for p in parts]
            tensors[name] = np.asarray(rule.shape.save(*layer), order="C")
        tensors |= dict.fromkeys(rule.copies, tensors[names(rule)[0]])
    return tensors


def faults(rules: Rules, tensors: Tensors, shapes: Mapping[str, Any], ignored: Iterable[str]) -> list[str]:
    """Returns, in words, what keeps `tensors` from being a model of these `shapes` (a tree of variables).

    These are missing and extra names, tensors of another shape or that are no floats, and copies that differ.
    `ignored` are patterns of names that may be present and are not read.
    """
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    wanted = [name for rule in rules for name in (*names(rule), *rule.copies)]
    missing = sorted(set(wanted) - set(tensors))
    extra = sorted(set(tensors) - set(wanted) - {name for rule in rules for name in rule.echoes})
    extra = [name for name in extra if not any(re.search(pattern, name) for pattern in ignored)]
    messages = _name_faults(missing, extra)
    for rule in rules:
        needed = [flat[path].shape[rule.layers is not None :] for path in rule.paths]
        for name in names(rule):
            if name in tensors and not _fits(rule.shape, tensors[name], needed):
                expected = _saved_shape(rule.shape, needed)
                messages.append(f"{name} has shape {tensors[name].shape}, not {expected}")
            if name in tensors and tensors[name].dtype.kind not in FLOATS:
                messages.append(f"{name} is of {tensors[name].dtype}, not of a float")
        first = names(rule)[0]
        messages += [
            f"{copy} differs from {first}, of which it must be a copy"
            for copy in (*rule.copies, *rule.echoes)
            if copy in tensors and first in tensors and not np.array_equal(tensors[copy], tensors[first])
        ]
    return messages


def _saved_shape(shape: Shape, needed: Sequence[tuple[int, ...]]) -> object:
    """Returns the shape of the foreign tensor of parts of these shapes; those themselves if they are huge."""
    if sum(map(math.prod, needed)) > HUGE:
        return needed
    return shape.save(*(np.empty(part, np.float32) for part in needed)).shape


def _name_faults(missing: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Returns the faults "missing A" and "unexpected B" in turn, the first missing with its closest match."""
    left, messages = list(extra), []
    for name in missing:
        messages.append(f"missing {name}")
        if left:
            near = difflib.get_close_matches(name, left, n=1, cutoff=0.0) if len(messages) == 1 else left
            messages.append(f"unexpected {near[0]}")
            left.remove(near[0])
    return messages + [f"unexpected {name}" for name in left]


def _fits(shape: Shape, tensor: Array, needed: Sequence[tuple[int, ...]]) -> bool:
    """Returns whether a foreign tensor is converted to parts of the `needed` shapes, and these back to it.

    A reshape alone takes tensors of other ranks, too.
    """
    try:
        parts = shape.load(tensor)
        return [part.shape for part in parts] == needed and shape.save(*parts).shape == tensor.shape
    except (ValueError, IndexError, TypeError):  # the tensor has another rank, or sizes that do not divide
        return False
