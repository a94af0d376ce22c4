"""A plan: memory and time of a run on hardware that is not here, compiled for it and timed by a stated model.

Memory and traffic between chips are exact, as they are read from the compiled program; on GPUs nearly so,
as matmuls are cuBLAS's here but may be XLA's own where it can time them. The time of a step is a model, whose
terms are:

- matmuls: multiply-adds at the chip's peak rate, which no program reaches;
- cycles: the TPU compiler's own estimate of what runs on the chip, with matmuls at the rate that it expects
  and main memory included. It leaves out attention kernels, collectives, stalls and waits for the host. The
  GPU's compiler makes no estimate;
- attention: a TPU's attention kernels, each taking its matmuls or its bytes at peak rates, whichever is
  longer;
- memory: bytes read and written at the full rate of main memory;
- kernels: all kernels of a chip, one after the other, each taking its matmuls or its bytes at those rates,
  whichever is longer, without collectives;
- network: each collective's bytes over the links of the torus that its group spans, both ways where they
  close to a ring. Latencies and traffic between slices are left out.

The time of a step is (cycles + attention, or else kernels) + network, one after the other; if the network
were hidden entirely behind the chip, it would be the longer of the two. MFU is the model's own operations
(the loss's gradient without recomputation) over the peak of all chips in that time.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scaling.parallel.mesh import AXES
from scaling.plan import hardware
from scaling.plan.compiler import Compiler, Request


@dataclass
class Plan:
    """Memory, time and cost of one program; numbers are per chip unless they say otherwise."""

    topology: str
    chips: int
    mesh: dict[str, int]
    fits: bool
    hbm_gib_needed: float
    hbm_gib_available: float
    what: str = "train"
    remat: str = "none"
    batch: int = 0
    hbm_gib: dict[str, float] = field(default_factory=dict)  # GiB of arguments and of temporaries
    tera_macs: float = 0.0  # multiply-adds, in units of 1e12
    hbm_gib_moved: float = 0.0  # GiB read from and written to main memory
    collectives: list[dict[str, Any]] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)  # the time of each term of the model
    step_time_ms: float = 0.0  # time of one call: a training step, a batch evaluated, or a batch sampled
    examples_per_second: float | None = None  # rate of all chips together
    mfu: float | None = None
    work_ratio: float | None = None  # multiply-adds done over the model's own: above 1 some are recomputed
    steps: int | None = None
    chip_hours: float | None = None
    hours: float | None = None
    notes: list[str] = field(default_factory=list)


def plan(compiler: Compiler, request: Request) -> Plan:
    """Compiles a program and returns its plan; bad input is a UserError, of the topology or the compiler."""
    chip, torus = hardware.slice_of(request.topology)
    answer = compiler.ask(dataclasses.asdict(request))
    result = Plan(
        request.topology, math.prod(torus), answer["mesh"], False, answer["needed_gib"], chip.hbm_gib,
        what=request.what, batch=answer["batch"], steps=answer["steps"],
    )  # fmt: skip
    result.fits = answer["fits"] and result.hbm_gib_needed <= chip.hbm_gib
    result.notes = list(answer["sharding_notes"])
    if result.fits and chip.switched and result.hbm_gib_needed > 0.75 * chip.hbm_gib:
        note = "jax takes 0.75 of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says more"
        result.notes.append(note)
    if answer["fits"]:
        _fill_in_times(result, answer, chip, torus)
    return result


def terms(facts: Mapping[str, Any], chip: hardware.Chip) -> dict[str, float]:
    """Returns the model's terms for one chip, in milliseconds, given the fields of `hlo_cost.ProgramCost`."""
    return {
        "matmuls": 2e3 * facts["macs"] / chip.flops,
        "memory": 1e3 * facts["hbm_bytes"] / chip.hbm_bytes,
        "kernels": 1e3 * facts["seconds"],
        "cycles": 1e3 * facts["cycles"] / chip.clock if chip.clock else 0.0,
        "attention": 1e3 * facts["attention"],
    }


def total(terms: Mapping[str, float]) -> float:
    """Returns the milliseconds of a step, with the network in series."""
    chip = terms["cycles"] + terms["attention"] if terms["cycles"] else terms["kernels"]
    return chip + terms["network"]


def _fill_in_times(
    result: Plan, answer: Mapping[str, Any], chip: hardware.Chip, torus: Sequence[int]
) -> None:
    """Fills in what a compiled program does, and how long it takes."""
    facts, memory = answer["facts"], answer["memory"]
    result.hbm_gib = {"arguments": memory["argument"] / 2**30, "temporaries": memory["temp"] / 2**30}
    result.tera_macs, result.hbm_gib_moved = facts["macs"] / 1e12, facts["hbm_bytes"] / 2**30
    result.collectives = collectives(facts["collectives"], answer["mesh"], answer["coords"], chip, torus)
    result.milliseconds = terms(facts, chip) | {"network": sum(row["ms"] for row in result.collectives)}
    result.step_time_ms = total(result.milliseconds)
    result.examples_per_second = 1e3 * result.batch / result.step_time_ms
    if not result.milliseconds["cycles"]:
        result.notes.append("no cycles from this compiler: the step is what its kernels take at peak rates")
    if result.milliseconds["attention"]:
        result.notes.append("no cycles for kernels of attention: they take what they would at peak rates")
    if result.what != "train":
        return
    flops = answer["cost"]["train_flops_per_step"]
    result.mfu = flops / (result.chips * chip.flops * result.step_time_ms / 1e3)
    result.work_ratio = 2 * facts["macs"] * result.chips / flops
    if result.steps is None:
        result.notes.append("steps unknown: the duration is in epochs of data not here; give --examples")
    else:
        result.hours = result.steps * result.step_time_ms / 3.6e6
        result.chip_hours = result.hours * result.chips


def collectives(
    listed: Sequence[Mapping[str, Any]],
    mesh: Mapping[str, int],
    coords: Sequence[Sequence[int]],
    chip: hardware.Chip,
    torus: Sequence[int],
) -> list[dict[str, Any]]:
    """Returns rows of collectives by kind and mesh axes: count, bytes and milliseconds per step."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in listed:
        group = one["group"] or range(math.prod(mesh.values()))
        axes = "+".join(_spanned_axes(group, mesh)) or "none"
        row = rows.setdefault((one["kind"], axes), dict(kind=one["kind"], axes=axes, count=0, bytes=0, ms=0))
        row["count"] += one["count"]
        row["bytes"] += one["count"] * one["bytes"]
        row["ms"] += 1e3 * one["count"] * seconds(one["kind"], one["bytes"], group, coords, chip, torus)
    return sorted(rows.values(), key=lambda row: -row["ms"])


def _spanned_axes(group: Sequence[int], mesh: Mapping[str, int]) -> list[str]:
    """Returns the mesh axes along which the places of a group differ."""
    sizes = [mesh[axis] for axis in AXES]
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    places = [
        [place // stride % size for stride, size in zip(strides, sizes, strict=True)] for place in group
    ]
    return [axis for i, axis in enumerate(AXES) if len({place[i] for place in places}) > 1]


def seconds(
    kind: str,
    size: float,
    group: Sequence[int],
    coords: Sequence[Sequence[int]],
    chip: hardware.Chip,
    torus: Sequence[int],
) -> float:
    """Returns the seconds of one collective on an array of `size` bytes, over the links that its group spans.

    A chip sends along all spanned dimensions of the torus at once, twice as fast along one that closes to a
    ring. An all-to-all takes as long as half of its data through the middle of the slowest dimension. GPUs
    are joined by a switch.
    """
    chips, rate = len(group), 0.0
    if chips <= 1 or not size:
        return 0.0
    middle = 0.0  # seconds of an all-to-all: half of it crosses the middle of the slowest dimension
    for d, (length, closes) in enumerate(zip(torus, chip.rings(torus), strict=True)):
        spanned = len({tuple(coords[place])[d] for place in group})
        if spanned > 1:
            links = 2 if closes and spanned == length else 1
            rate += chip.link_bytes * links
            middle = max(middle, size * spanned / 4 / (chip.link_bytes * links))
    share = (chips - 1) / chips
    if kind == "collective-permute":
        return size / chip.link_bytes
    if kind == "all-to-all" and not chip.switched:
        return middle
    return size * share * (2 if kind == "all-reduce" else 1) / rate
