"""What a compiled program does, read from its text: products, bytes and collectives, loops multiplied out.

XLA's own cost analysis counts a loop's body once, and knows nothing of links. The text has it all: each
computation is walked as often as its loops run it.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from scaling.program import Computation, Instruction, arrays, parse, runs, shape, size

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What moves no bytes of its own: names of other values, and loops and calls, whose bodies are walked.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}
FREE |= {"after-all", "partition-id", "replica-id", "iota", "async-start", "async-update", "async-done"}

SLICES = {"slice", "dynamic-slice"}
PRODUCTS = ("__cublas$gemm", "__cublas$lt$matmul", "__cudnn$conv", "__cudnn$fmha")  # a GPU's libraries'
TPU_KERNEL = "tpu_custom_call"
# Of a TPU's attention: q k^T and p v; for keys' and values' gradients four products, for queries' three.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_SCRATCH = re.compile(r"\b[su]8\[\d+\]")  # what a GPU's kernel is lent to work in


@dataclass(frozen=True)
class Collective:
    """One of a program's collectives: it runs `count` times, each on `bytes` (of the array, whole)."""

    kind: str
    bytes: float
    group: tuple[int, ...]  # the first of its groups, as places in the mesh; the first pair of a permute
    count: float


@dataclass
class Facts:
    """Of one chip's program, all loops run through."""

    macs: float = 0.0  # of matrix products, convolutions and kernels of attention
    hbm_bytes: float = 0.0  # read and written by what is not fused into something else
    cycles: float = 0.0  # the compiler's estimate; 0 where it makes none
    seconds: float = 0.0  # one instruction after the other, at the rates of `read`, without collectives
    attention: float = 0.0  # of `seconds`, those of a TPU's kernels of attention, which `cycles` leave out
    kernels: dict[str, float] = field(default_factory=dict)  # custom calls: how often
    collectives: list[Collective] = field(default_factory=list)


def read(text: str, flops: float = math.inf, hbm_bytes: float = math.inf) -> Facts:
    """The facts of `compiled.as_text()`.

    At so many floating-point operations and bytes a second, `seconds` has of each instruction whichever
    takes longer.
    """
    program, entry = parse(text)
    walked = list(runs(program, entry))
    facts = Facts(collectives=_collectives(walked))
    for computation, times, scheduled in walked:
        for i in computation.values():
            if i.op == "custom-call":
                facts.kernels[i.target] = facts.kernels.get(i.target, 0) + times
            if not scheduled:  # what is in a fusion is the fusion's
                continue
            work, moved = _within(program, computation, i), _traffic(program, computation, i)
            facts.macs += times * work
            facts.hbm_bytes += times * moved
            if _kind(i) not in COLLECTIVES:
                seconds = times * max(2 * work / flops, moved / hbm_bytes)
                facts.seconds += seconds
                facts.attention += seconds if i.target == TPU_KERNEL else 0.0
                facts.cycles += times * _cycles(i)
    return facts


# Work


def macs(computation: Computation, i: Instruction) -> float:
    """Multiply-adds of a matrix product, a convolution (of its padding none) or a kernel of attention."""
    if i.target == TPU_KERNEL:
        return _splash(computation, i)
    if i.op not in ("dot", "convolution") and not i.target.startswith(PRODUCTS):
        return 0.0
    left, right = (shape(computation[name].type) for name in i.operands[:2])
    result = shape(i.type)
    if i.op == "dot" or i.target.startswith("__cublas"):
        return float(math.prod(result) * math.prod(left[d] for d in _contracted(i)))
    if "fmha" in i.target:  # left is q [B, N, h, d], right is k; going back q k^T is computed again
        return float(math.prod(left) * right[1] * (5 if "Backward" in i.target else 2))
    if "convBackwardInput" in i.target:
        left, result = result, left
    if "convBackwardFilter" in i.target:
        right, result = result, right
    return _convolution(i, left, right, result)


def _splash(computation: Computation, i: Instruction) -> float:
    """Of a TPU's kernel that is attention's; of others, which are not known, 0."""
    products = next((n for name, n in SPLASH.items() if i.name.startswith(name)), 0)
    shapes = [shape(computation[name].type) for name in i.operands]
    heads = [each for each in shapes if len(each) == 4]  # q [B, h, N, d], k [B, h, M, d], ...
    return float(products * math.prod(heads[0]) * heads[1][2]) if products else 0.0


def _within(program: dict[str, Computation], computation: Computation, i: Instruction) -> float:
    """Multiply-adds of an instruction, with what is fused into it."""
    if i.op != "fusion":
        return macs(computation, i)
    inside = program[i.attribute("calls")]
    return sum(_within(program, inside, each) for each in inside.values())


def _contracted(i: Instruction) -> list[int]:
    """The axes of its left side that a product sums over."""
    if i.op == "dot":
        return [int(d) for d in i.attribute("lhs_contracting_dims").split(",") if d]
    listed = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', i.rest)
    return [int(d) for d in re.findall(r"\d+", listed[1])] if listed else []


def _convolution(
    i: Instruction, image: tuple[int, ...], kernel: tuple[int, ...], result: tuple[int, ...]
) -> float:
    labels = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels"))
    assert labels is not None
    left, right, out = labels.groups()
    window = _window(i.attribute("window"))
    total = kernel[right.index("i")] * result[out.index("b")] * result[out.index("f")]
    for d in (c for c in out if c.isdecimal()):
        k = kernel[right.index(d)]
        total *= _pairs(image[left.index(d)], k, result[out.index(d)], window, int(d))
    return float(total)


def _window(text: str) -> dict[str, list[str]]:
    return {key: values.split("x") for key, values in (part.split("=") for part in text.split())}


def _pairs(image: int, kernel: int, result: int, window: dict[str, list[str]], d: int) -> int:
    """How many (place in the result, place in the kernel) meet a real element, along one axis."""

    def of(key: str, default: str) -> str:
        return window[key][d] if key in window else default

    low = int(of("pad", "0_0").split("_")[0])
    stride, spread, apart = (int(of(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    at = np.arange(result)[:, None] * stride - low + np.arange(kernel)[None] * apart
    return int(((at >= 0) & (at <= (image - 1) * spread) & (at % spread == 0)).sum())


def _cycles(i: Instruction) -> float:
    found = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
    return float(found[1]) if found else 0.0


def _hbm(kind: str) -> float:
    """Bytes of a type that are in main memory, and not in one of the chip's own, such as S(1)."""
    return sum(each * math.prod(dims) for each, dims, layout in arrays(kind) if "S(" not in layout)


def _traffic(program: dict[str, Computation], computation: Computation, i: Instruction) -> float:
    """Bytes that an instruction reads from main memory and writes there."""
    if i.op in FREE or i.op.endswith("-done"):
        return 0.0
    operands = [computation[name].type for name in i.operands if name in computation]
    if i.op in SLICES:
        return 2 * _hbm(i.type)
    if i.op == "dynamic-update-slice":
        return 2 * _hbm(operands[1])
    if i.op != "fusion":
        return sum(map(_hbm, operands)) + _hbm(_SCRATCH.sub("", i.type) if i.target else i.type)
    inside = program[i.attribute("calls")]
    total, result = 0.0, _hbm(i.type)
    parameters = sorted((p for p in inside.values() if p.op == "parameter"), key=lambda p: int(p.inside))
    for parameter, kind in zip(parameters, operands, strict=False):
        users = list(_users(inside, parameter.name))
        if users and all(u.op in SLICES and u.operands[0] == name for u, name in users):  # a layer of a stack
            total += sum(_hbm(u.type) for u, _ in users)
        elif users and all(_updates(u, name) for u, name in users):  # written in place
            written = sum(_hbm(inside[u.operands[1]].type) for u, _ in users)
            total, result = total + written, max(0.0, result - _hbm(kind))
        else:
            total += _hbm(kind)
    return total + result


def _users(computation: Computation, name: str) -> Iterator[tuple[Instruction, str]]:
    """What uses a value, by this name or as a bitcast of it, which is the same bytes; and that name."""
    for i in computation.values():
        if name in i.operands and i.op == "bitcast":
            yield from _users(computation, i.name)
        elif name in i.operands:
            yield i, name


def _updates(user: Instruction, name: str) -> bool:
    return user.op == "dynamic-update-slice" and user.operands[0] == name


# Collectives


def _collectives(walked: Iterable[tuple[Computation, float, bool]]) -> list[Collective]:
    """Each once: what a fusion begins goes on in others, on the same channel."""
    found, begun, hidden = [], set(), []
    for computation, times, scheduled in walked:
        for i in (each for each in computation.values() if _kind(each) in COLLECTIVES):
            one = _collective(_kind(i) if scheduled else _fused(computation, i), computation, i, times)
            if scheduled:
                found.append(one)
            elif _begins(computation):
                found.append(one)
                begun.add(i.attribute("channel_id"))
            else:
                hidden.append((i.attribute("channel_id"), one))
    return found + [one for channel, one in hidden if channel not in begun]


def _kind(i: Instruction) -> str:
    return i.op.removesuffix("-start")


def _fused(computation: Computation, i: Instruction) -> str:
    """Its kind within a fusion: a sum of which a slice is taken is a reduce-scatter."""
    users = {user.op for user in computation.values() if i.name in user.operands}
    return "reduce-scatter" if _kind(i) == "all-reduce" and users == {"dynamic-slice"} else _kind(i)


def _begins(computation: Computation) -> bool:
    """Whether a fusion begins a collective, which then goes on in others, behind their work, on its channel.

    A channel does not tell one collective from another: layers that are no loop share theirs.
    """
    return any(i.target == "AsyncCollectiveStart" for i in computation.values())


def _collective(kind: str, computation: Computation, i: Instruction, times: float) -> Collective:
    group = _group(i)
    given = sum(size(computation[name].type) for name in i.operands if name in computation)
    return Collective(kind, given * len(group) if kind == "all-gather" else given, group, times)


def _group(i: Instruction) -> tuple[int, ...]:
    """The first of mesh['a'=2,'b'=4] {'b'}, {{0,1},{2,3}} (of a permute, pairs) or [2,4]<=[4,2]T(1,0)."""
    if named := _MESH.search(i.rest):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        within = re.findall(r"'([^']+)'", named[4])
        places = _places(named[2] or str(math.prod(sizes.values())), named[3]).reshape(list(sizes.values()))
        along = tuple(slice(None) if axis in within else 0 for axis in sizes)
        return tuple(int(n) for n in places[along].reshape(-1))
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", i.rest):
        return tuple(int(n) for n in listed[1].split(","))
    if iota := _IOTA.search(i.rest):
        return tuple(int(n) for n in _places(iota[2], iota[3]).reshape(_numbers(iota[1]))[0])
    return ()


_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def _places(dims: str, order: str | None) -> np.ndarray:
    """0, 1, ... as an array of `dims`, its axes then in another order."""
    places = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return places.transpose(_numbers(order)) if order else places


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
