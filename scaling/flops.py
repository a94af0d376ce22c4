"""Multiply-adds of any JAX function, counted by walking its jaxpr.

The count is of matmuls and convolutions, as in papers, without normalisation, activations, softmax and
indexing. One multiply-add counts as one, so FLOPs are twice the figure.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

CALLS = {  # primitives that run their one jaxpr once
    "jit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call",
}  # fmt: skip
OPAQUE = {"pallas_call", "ffi_call", "pure_callback"}  # primitives whose computation no jaxpr shows
COUNTING: dict[str, Callable[..., int]] = {  # the arithmetic of loop counters
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": min, "max": max, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "convert_element_type": int,
}  # fmt: skip
MAX_TRIPS = 1_000_000

Atom = core.Var | core.Literal
Value = int | None  # an integer that is plain from the jaxpr, or None
Jaxpr = core.Jaxpr | core.ClosedJaxpr


def macs(fn: Callable[..., Any], *args: Any) -> int:
    """Counts the multiply-adds of the matmuls and convolutions in one call of `fn(*args)`.

    Arrays in `args` may be `jax.ShapeDtypeStruct`s: nothing is computed or allocated. A scan counts as often
    as it runs, a cond as its costliest branch, a while loop as often as its counter shows. Padding of a
    convolution counts, zeros inserted by dilation do not. Recomputation by remat in a backward pass counts.

    Raises:
        ValueError: if multiply-adds cannot be counted: in a while loop whose number of trips the jaxpr does
            not show, in a custom kernel, or in a primitive unknown here.
    """
    return _count(jax.make_jaxpr(fn)(*args), [])


def _count(jaxpr: Jaxpr, values: Sequence[Value]) -> int:
    """Counts a jaxpr whose first inputs have these values."""
    bindings = _bind(jaxpr, values)
    return sum(_count_equation(eqn, bindings) for eqn in _open(jaxpr).eqns)


def _count_equation(eqn: core.JaxprEqn, bindings: Mapping[Any, Value]) -> int:
    name, params = eqn.primitive.name, eqn.params
    values = [_value(atom, bindings) for atom in eqn.invars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
        return math.prod(out) * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _count_convolution(eqn)
    if name in OPAQUE or "dot" in name or "matmul" in name:  # ragged or scaled matmuls, fused attention
        raise ValueError(f"cannot count the multiply-adds of primitive {name}: use the function's plain form")
    if name == "scan":
        return params["length"] * _count(params["jaxpr"], [])
    if name == "while":
        return _count_while(params, values)
    if name == "cond":
        return max(_count(branch, values[1:]) for branch in params["branches"])
    total = sum(_count(jaxpr, values if name in CALLS else []) for jaxpr in _inner_jaxprs(params))
    if total and name not in CALLS:
        raise ValueError(f"cannot tell how often primitive {name} runs its multiply-adds")
    return total


def _count_convolution(eqn: core.JaxprEqn) -> int:
    rhs, out, params = _shape(eqn.invars[1]), _shape(eqn.outvars[0]), eqn.params
    # The kernel's axes are out, in, *spatial; the output's are batch, feature, *spatial.
    _, rhs_spec, out_spec = params["dimension_numbers"]
    count = out[out_spec[0]] * out[out_spec[1]] * rhs[rhs_spec[1]]  # the in-features are those of one group
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    windows = zip(*(params[name] for name in names), strict=True)
    for axis, (stride, (low, _), inserted, spread) in enumerate(windows, start=2):
        window = np.arange(out[out_spec[axis]])[:, None] * stride - low
        tap = np.arange(rhs[rhs_spec[axis]])[None, :] * spread
        count *= int(np.sum((window + tap) % inserted == 0))  # the others fall on inserted zeros
    return count


def _count_while(params: Mapping[str, Any], values: Sequence[Value]) -> int:
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    split, start = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = values[:split], values[split:start], values[start:]
    cond_count, body_count = _count(cond, cond_consts), _count(body, body_consts)
    if not cond_count and not body_count:
        return 0
    for trips in range(MAX_TRIPS):
        (runs_again,) = _integer_outputs(cond, [*cond_consts, *carry])
        if runs_again is None:
            break
        if not runs_again:
            return trips * body_count + (trips + 1) * cond_count
        carry = _integer_outputs(body, [*body_consts, *carry])
    raise ValueError("cannot tell how often a while loop with multiply-adds runs: use a scan")


def _integer_outputs(jaxpr: Jaxpr, values: Sequence[Value]) -> list[Value]:
    """Runs a jaxpr's integer arithmetic; returns its outputs, None for those that the inputs do not tell."""
    bindings = _bind(jaxpr, values)
    for eqn in _open(jaxpr).eqns:
        operands = [_value(atom, bindings) for atom in eqn.invars]
        if eqn.primitive.name in COUNTING and None not in operands:
            bindings[eqn.outvars[0]] = COUNTING[eqn.primitive.name](*operands)
    return [_value(atom, bindings) for atom in _open(jaxpr).outvars]


def _bind(jaxpr: Jaxpr, values: Sequence[Value]) -> dict[Any, Value]:
    """Returns the values of a jaxpr's constants and of its first inputs, by variable."""
    consts = jaxpr.consts if isinstance(jaxpr, core.ClosedJaxpr) else []
    bindings = dict(zip(_open(jaxpr).constvars, map(_integer, consts), strict=False))
    return bindings | dict(zip(_open(jaxpr).invars, values, strict=False))


def _value(atom: Atom, bindings: Mapping[Any, Value]) -> Value:
    return _integer(atom.val) if isinstance(atom, core.Literal) else bindings.get(atom)


def _integer(value: Any) -> Value:
    is_integer = np.ndim(value) == 0 and np.issubdtype(np.result_type(value), np.integer)
    return int(value) if is_integer else None


def _shape(atom: Atom) -> tuple[int, ...]:
    return atom.aval.shape  # type: ignore[attr-defined]


def _open(jaxpr: Jaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        yield from (
            v for v in (value if isinstance(value, tuple | list) else [value]) if isinstance(v, Jaxpr)
        )
