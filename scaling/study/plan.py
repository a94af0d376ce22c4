"""What a run needs on hardware that is not here, and what it costs: compiled there, timed by a stated model.

What is compiled is exact: memory, and what travels between chips; of GPUs nearly, whose products are cuBLAS's
here and may be XLA's own where it can try them out. The time of a step is a model:

- products: multiply-adds at the chip's peak rate, which no program reaches;
- cycles: the TPU compiler's own estimate for what runs on the chip, products at the rate that it expects of
  them and main memory included. Kernels of attention, collectives and stalls are not in it, nor is waiting
  for the host. The GPU's makes none;
- attention: those kernels of a TPU's, each the longer of its products and its bytes at peak rates;
- memory: bytes read and written at the full rate of main memory;
- kernels: all of a chip's, one after the other, each the longer of its products and its bytes at those
  rates, collectives left out;
- network: each collective's bytes over the links of the torus that its group spans, both ways where they
  close to a ring. Latencies are left out, and so is what travels between slices.

A step is taken as (cycles + attention, or else kernels) + network, one after the other; with all of the
network hidden behind the chip it would be the longer of the two. MFU is the model's own operations (the
loss's gradient without recomputation) over the peak of all chips in that time.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Self

from scaling import hardware
from scaling.engine.config import AXES
from scaling.errors import UserError


@dataclass(frozen=True)
class Request:
    """What to plan: one program of a run, on one slice.

    Raises: UserError for a number below 1.
    """

    config: str
    topology: str
    overrides: Sequence[str] = ()
    what: str = "train"
    batch: int | None = None  # global; None is the config's
    examples: int | None = None  # of an epoch, where the data are not here
    side: int | None = None  # of the model's input, likewise; None is what the variant is made for

    def __post_init__(self) -> None:
        given = {"global-batch": self.batch, "examples": self.examples, "side": self.side}
        for name, value in given.items():
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")


@dataclass
class Plan:
    """Of one chip, unless it says otherwise."""

    topology: str
    chips: int
    mesh: dict[str, int]
    fits: bool
    hbm_gib_needed: float
    hbm_gib_available: float
    what: str = "train"
    remat: str = "none"
    batch: int = 0
    hbm_gib: dict[str, float] = field(default_factory=dict)  # arguments, temporaries
    tera_macs: float = 0.0
    hbm_gib_moved: float = 0.0
    collectives: list[dict[str, Any]] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)  # the terms of the model
    step_time_ms: float = 0.0  # of one call: a training step, a batch evaluated, or a batch sampled
    examples_per_second: float | None = None  # of the whole slice
    mfu: float | None = None
    work_ratio: float | None = None  # products done over those of the model: more than 1 is recomputed
    steps: int | None = None
    chip_hours: float | None = None
    hours: float | None = None
    notes: list[str] = field(default_factory=list)


# XLA would try a GPU's kernels out on it; its own library's, cuBLAS's, need no trying.
UNTRIED = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"


class Compiler:
    """The process that compiles for machines such as `topology`; use as a context.

    Raises: UserError for one that does not exist, or whose compiler is not installed.
    """

    def __init__(self, topology: str) -> None:
        gpu = hardware.slice_of(topology)[0].switched
        module, extra = ("jax_cuda13_plugin", "cuda") if gpu else ("libtpu", "tpu")
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"plan: needs {module}, the compiler; install the extra: pip install '.[{extra}]'"
            )
        self.flags = UNTRIED if gpu else ""
        self.noise: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.noise.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of `engine.aot`; raises UserError where it is an error, or the compiler died."""
        if self.process is None:
            self.process = self._started()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code, self.process = self.process.wait(), None
            raise UserError(f"topology={request['topology']}: the compiler ended with {code}: {self._said()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _started(self) -> "subprocess.Popen[str]":
        env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        env["XLA_FLAGS"] = self.flags
        command = [sys.executable, "-m", "scaling.engine.aot"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=self.noise)

    def _said(self) -> str:
        self.noise.seek(0)
        lines = self.noise.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"


def plan(compiler: Compiler, request: Request) -> Plan:
    """Compiles, and works out the time; raises UserError for bad input."""
    chip, torus = hardware.slice_of(request.topology)
    found = compiler.ask(dataclasses.asdict(request))
    made = Plan(
        request.topology, math.prod(torus), found["mesh"], False, found["needed_gib"], chip.hbm_gib,
        what=request.what, batch=found["batch"], steps=found["steps"],
    )  # fmt: skip
    made.fits = found["fits"] and made.hbm_gib_needed <= chip.hbm_gib
    made.notes = list(found["uncut"])
    if made.fits and chip.switched and made.hbm_gib_needed > 0.75 * chip.hbm_gib:
        made.notes.append("jax takes 0.75 of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says more")
    if found["fits"]:
        _time(made, found, chip, torus)
    return made


def terms(facts: Mapping[str, Any], chip: hardware.Chip) -> dict[str, float]:
    """Milliseconds that a program's `hlo.Facts` take on one chip, each by itself."""
    return {
        "products": 2e3 * facts["macs"] / chip.flops,
        "memory": 1e3 * facts["hbm_bytes"] / chip.hbm_bytes,
        "kernels": 1e3 * facts["seconds"],
        "cycles": 1e3 * facts["cycles"] / chip.clock if chip.clock else 0.0,
        "attention": 1e3 * facts["attention"],
    }


def total(terms: Mapping[str, float]) -> float:
    """Milliseconds of a step, the network in series."""
    chip = terms["cycles"] + terms["attention"] if terms["cycles"] else terms["kernels"]
    return chip + terms["network"]


def _time(made: Plan, found: Mapping[str, Any], chip: hardware.Chip, torus: Sequence[int]) -> None:
    """Fills in what a program that compiled does, and how long it takes."""
    facts, memory = found["facts"], found["memory"]
    made.hbm_gib = {"arguments": memory["argument"] / 2**30, "temporaries": memory["temp"] / 2**30}
    made.tera_macs, made.hbm_gib_moved = facts["macs"] / 1e12, facts["hbm_bytes"] / 2**30
    made.collectives = collectives(facts["collectives"], found["mesh"], found["coords"], chip, torus)
    made.milliseconds = terms(facts, chip) | {"network": sum(row["ms"] for row in made.collectives)}
    made.step_time_ms = total(made.milliseconds)
    made.examples_per_second = 1e3 * made.batch / made.step_time_ms
    if not made.milliseconds["cycles"]:
        made.notes.append("no cycles from this compiler: the step is what its kernels take at peak rates")
    if made.milliseconds["attention"]:
        made.notes.append("no cycles for kernels of attention: they take what they would at peak rates")
    if made.what != "train":
        return
    flops = found["cost"]["train_flops_per_step"]
    made.mfu = flops / (made.chips * chip.flops * made.step_time_ms / 1e3)
    made.work_ratio = 2 * facts["macs"] * made.chips / flops
    if made.steps is None:
        made.notes.append("steps unknown: the duration is in epochs of data not here; give --examples")
    else:
        made.hours = made.steps * made.step_time_ms / 3.6e6
        made.chip_hours = made.hours * made.chips


def collectives(
    found: Sequence[Mapping[str, Any]],
    mesh: Mapping[str, int],
    coords: Sequence[Sequence[int]],
    chip: hardware.Chip,
    torus: Sequence[int],
) -> list[dict[str, Any]]:
    """Collectives by kind and mesh axes: how often, their bytes and milliseconds in a step."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found:
        group = one["group"] or range(math.prod(mesh.values()))
        axes = "+".join(_axes(group, mesh)) or "none"
        row = rows.setdefault((one["kind"], axes), dict(kind=one["kind"], axes=axes, count=0, bytes=0, ms=0))
        row["count"] += one["count"]
        row["bytes"] += one["count"] * one["bytes"]
        row["ms"] += 1e3 * one["count"] * seconds(one["kind"], one["bytes"], group, coords, chip, torus)
    return sorted(rows.values(), key=lambda row: -row["ms"])


def _axes(group: Sequence[int], mesh: Mapping[str, int]) -> list[str]:
    """The mesh axes along which the places of a group differ."""
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
    """One collective on an array of `size` bytes, over the links that its group spans.

    Along each dimension of the torus a chip sends both ways, twice as fast if the dimension closes to a ring;
    an all-to-all takes as long as half of its data through the middle of a dimension. GPUs are joined by a
    switch.
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
