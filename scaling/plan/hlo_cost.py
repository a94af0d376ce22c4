"""The cost of a compiled program, from its text: matmuls, bytes and collectives, loops multiplied out.

XLA's own cost analysis counts a loop's body once, and knows nothing of links. The text has both: each
computation is counted as often as its loops run it.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from scaling.plan.hlo_text import Computation, Instruction, arrays, parse, runs, shape, size

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that move no bytes: names of other values, and loops and calls, whose bodies are counted.
FREE_OPS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
FREE_OPS |= {"after-all", "partition-id", "replica-id", "iota", "async-start", "async-update", "async-done"}

SLICES = {"slice", "dynamic-slice"}
# How targets of a GPU's custom calls begin: matmuls, convolutions and attention of its libraries.
GPU_KERNELS = ("__cublas$gemm", "__cublas$lt$matmul", "__cudnn$conv", "__cudnn$fmha")
TPU_KERNEL = "tpu_custom_call"
# Matmuls in a TPU's attention: q k^T and p v; four for the gradients of keys and values, three for queries'.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_SCRATCH = re.compile(r"\b[su]8\[\d+\]")  # the workspace of a GPU's kernel


@dataclass(frozen=True)
class Collective:
    """A collective of a program: it runs `count` times, each time on `bytes` (of the full array)."""

    kind: str
    bytes: float
    group: tuple[int, ...]  # the first of its groups, as places in the mesh; of a permute the first pair
    count: float


@dataclass
class ProgramCost:
    """The cost of one chip's program, all loops run through."""

    macs: float = 0.0  # multiply-adds of matmuls, convolutions and attention kernels
    hbm_bytes: float = 0.0  # bytes read and written by instructions that are not fused into others
    cycles: float = 0.0  # the compiler's estimate; 0 where it makes none
    seconds: float = 0.0  # one instruction after the other, at the peak rates given, without collectives
    attention: float = 0.0  # the part of `seconds` in a TPU's attention kernels, which `cycles` leave out
    kernels: dict[str, float] = field(default_factory=dict)  # custom calls, and how often each runs
    collectives: list[Collective] = field(default_factory=list)


def program_cost(text: str, flops: float = math.inf, hbm_bytes: float = math.inf) -> ProgramCost:
    """Returns the cost of a program, given its text, `compiled.as_text()`.

    `flops` and `hbm_bytes` are peak rates, per second: `seconds` counts for each instruction its operations
    or its bytes, whichever take longer.
    """
    program, entry = parse(text)
    executed = list(runs(program, entry))
    cost = ProgramCost(collectives=_collectives(executed))
    for computation, times, scheduled in executed:
        for i in computation.values():
            if i.op == "custom-call":
                cost.kernels[i.target] = cost.kernels.get(i.target, 0) + times
            if not scheduled:  # counted with the fusion that it is in
                continue
            work, moved = _fused_macs(program, computation, i), _hbm_traffic(program, computation, i)
            cost.macs += times * work
            cost.hbm_bytes += times * moved
            if _kind(i) not in COLLECTIVES:
                seconds = times * max(2 * work / flops, moved / hbm_bytes)
                cost.seconds += seconds
                cost.attention += seconds if i.target == TPU_KERNEL else 0.0
                cost.cycles += times * _cycles(i)
    return cost


# Multiply-adds


def macs(computation: Computation, i: Instruction) -> float:
    """Returns the multiply-adds of a matmul, a convolution (none of its padding) or an attention kernel."""
    if i.target == TPU_KERNEL:
        return _splash_macs(computation, i)
    if i.op not in ("dot", "convolution") and not i.target.startswith(GPU_KERNELS):
        return 0.0
    left, right = (shape(computation[name].type) for name in i.operands[:2])
    result = shape(i.type)
    if i.op == "dot" or i.target.startswith("__cublas"):
        return float(math.prod(result) * math.prod(left[d] for d in _contracted_axes(i)))
    if "fmha" in i.target:  # left is q [B, N, h, d], right is k; the backward pass computes q k^T again
        return float(math.prod(left) * right[1] * (5 if "Backward" in i.target else 2))
    if "convBackwardInput" in i.target:
        left, result = result, left
    if "convBackwardFilter" in i.target:
        right, result = result, right
    return _convolution_macs(i, left, right, result)


def _splash_macs(computation: Computation, i: Instruction) -> float:
    """Returns the multiply-adds of a TPU's attention kernel; 0 for other kernels, which are unknown."""
    matmuls = next((n for name, n in SPLASH.items() if i.name.startswith(name)), 0)
    shapes = [shape(computation[name].type) for name in i.operands]
    heads = [each for each in shapes if len(each) == 4]  # q [B, h, N, d], k [B, h, M, d], ...
    return float(matmuls * math.prod(heads[0]) * heads[1][2]) if matmuls else 0.0


def _fused_macs(program: dict[str, Computation], computation: Computation, i: Instruction) -> float:
    """Returns the multiply-adds of an instruction and of those fused into it."""
    if i.op != "fusion":
        return macs(computation, i)
    inside = program[i.attribute("calls")]
    return sum(_fused_macs(program, inside, each) for each in inside.values())


def _contracted_axes(i: Instruction) -> list[int]:
    """Returns the axes of its left operand that a matmul sums over."""
    if i.op == "dot":
        return [int(d) for d in i.attribute("lhs_contracting_dims").split(",") if d]
    match = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', i.rest)
    return [int(d) for d in re.findall(r"\d+", match[1])] if match else []


def _convolution_macs(
    i: Instruction, image: tuple[int, ...], kernel: tuple[int, ...], result: tuple[int, ...]
) -> float:
    labels = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels"))
    assert labels is not None
    left, right, out = labels.groups()
    window = _parse_window(i.attribute("window"))
    total = kernel[right.index("i")] * result[out.index("b")] * result[out.index("f")]
    for d in (c for c in out if c.isdecimal()):
        k = kernel[right.index(d)]
        total *= _real_pairs(image[left.index(d)], k, result[out.index(d)], window, int(d))
    return float(total)


def _parse_window(text: str) -> dict[str, list[str]]:
    return {key: values.split("x") for key, values in (part.split("=") for part in text.split())}


def _real_pairs(image: int, kernel: int, result: int, window: dict[str, list[str]], d: int) -> int:
    """Returns how many (place in the result, place in the kernel) meet a real element, along one axis."""

    def value(key: str, default: str) -> str:
        return window[key][d] if key in window else default

    low = int(value("pad", "0_0").split("_")[0])
    stride, spread, apart = (int(value(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    at = np.arange(result)[:, None] * stride - low + np.arange(kernel)[None] * apart
    return int(((at >= 0) & (at <= (image - 1) * spread) & (at % spread == 0)).sum())


def _cycles(i: Instruction) -> float:
    match = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
    return float(match[1]) if match else 0.0


# Main memory


def _hbm_bytes(kind: str) -> float:
    """Returns the bytes of a type that are in main memory, and not in the chip's own, such as S(1)."""
    return sum(each * math.prod(dims) for each, dims, layout in arrays(kind) if "S(" not in layout)


def _hbm_traffic(program: dict[str, Computation], computation: Computation, i: Instruction) -> float:
    """Returns the bytes that an instruction reads from main memory and writes there."""
    if i.op in FREE_OPS or i.op.endswith("-done"):
        return 0.0
    operands = [computation[name].type for name in i.operands if name in computation]
    if i.op in SLICES:
        return 2 * _hbm_bytes(i.type)
    if i.op == "dynamic-update-slice":
        return 2 * _hbm_bytes(operands[1])
    if i.op != "fusion":
        result_type = _SCRATCH.sub("", i.type) if i.target else i.type
        return sum(map(_hbm_bytes, operands)) + _hbm_bytes(result_type)
    inside = program[i.attribute("calls")]
    moved, result = 0.0, _hbm_bytes(i.type)
    parameters = sorted((p for p in inside.values() if p.op == "parameter"), key=lambda p: int(p.inside))
    for parameter, kind in zip(parameters, operands, strict=False):
        users = list(_users(inside, parameter.name))
        if users and all(u.op in SLICES and u.operands[0] == name for u, name in users):  # a layer of a stack
            moved += sum(_hbm_bytes(u.type) for u, _ in users)
        elif users and all(_updates_in_place(u, name) for u, name in users):
            rows = sum(_hbm_bytes(inside[u.operands[1]].type) for u, _ in users)
            moved, result = moved + rows, max(0.0, result - _hbm_bytes(kind))
        else:
            moved += _hbm_bytes(kind)
    return moved + result


def _users(computation: Computation, name: str) -> Iterator[tuple[Instruction, str]]:
    """Yields a value's users and the name they use: its own, or that of a bitcast (the same bytes)."""
    for i in computation.values():
        if name in i.operands and i.op == "bitcast":
            yield from _users(computation, i.name)
        elif name in i.operands:
            yield i, name


def _updates_in_place(user: Instruction, name: str) -> bool:
    return user.op == "dynamic-update-slice" and user.operands[0] == name


# Collectives


def _collectives(executed: Iterable[tuple[Computation, float, bool]]) -> list[Collective]:
    """Returns each collective once: one that a fusion begins may continue in others, on the same channel."""
    collectives, begun, hidden = [], set(), []
    for computation, times, scheduled in executed:
        for i in (each for each in computation.values() if _kind(each) in COLLECTIVES):
            kind = _kind(i) if scheduled else _kind_in_fusion(computation, i)
            one = _make_collective(kind, computation, i, times)
            if scheduled:
                collectives.append(one)
            elif _begins_collective(computation):
                collectives.append(one)
                begun.add(i.attribute("channel_id"))
            else:
                hidden.append((i.attribute("channel_id"), one))
    return collectives + [one for channel, one in hidden if channel not in begun]


def _kind(i: Instruction) -> str:
    return i.op.removesuffix("-start")


def _kind_in_fusion(computation: Computation, i: Instruction) -> str:
    """Returns a collective's kind within a fusion: a sum of which a slice is taken is a reduce-scatter."""
    users = {user.op for user in computation.values() if i.name in user.operands}
    return "reduce-scatter" if _kind(i) == "all-reduce" and users == {"dynamic-slice"} else _kind(i)


def _begins_collective(computation: Computation) -> bool:
    """Returns whether a fusion begins a collective, which others on its channel continue behind their work.

    A channel does not identify a collective: unrolled layers share theirs.
    """
    return any(i.target == "AsyncCollectiveStart" for i in computation.values())


def _make_collective(kind: str, computation: Computation, i: Instruction, times: float) -> Collective:
    group = _group(i)
    operands = sum(size(computation[name].type) for name in i.operands if name in computation)
    return Collective(kind, operands * len(group) if kind == "all-gather" else operands, group, times)


def _group(i: Instruction) -> tuple[int, ...]:
    """Returns the first group of an instruction, whose groups are written in one of three ways.

    These are mesh['a'=2,'b'=4] {'b'}, {{0,1},{2,3}} (pairs, for a permute) and [2,4]<=[4,2]T(1,0).
    """
    if named := _MESH.search(i.rest):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        within = re.findall(r"'([^']+)'", named[4])
        places = _places(named[2] or str(math.prod(sizes.values())), named[3]).reshape(list(sizes.values()))
        along = tuple(slice(None) if axis in within else 0 for axis in sizes)
        return tuple(int(n) for n in places[along].reshape(-1))
    if explicit := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", i.rest):
        return tuple(int(n) for n in explicit[1].split(","))
    if iota := _IOTA.search(i.rest):
        return tuple(int(n) for n in _places(iota[2], iota[3]).reshape(_parse_ints(iota[1]))[0])
    return ()


_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _places(dims: str, order: str | None) -> np.ndarray:
    """Returns 0, 1, ... as an array of shape `dims`, its axes then transposed to `order`."""
    places = np.arange(math.prod(_parse_ints(dims))).reshape(_parse_ints(dims))
    return places.transpose(_parse_ints(order)) if order else places


def _parse_ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
