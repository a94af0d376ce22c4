"""Plans compared: over meshes, batches and remat policies of one run, and over the runs of a study."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scaling import hardware
from scaling.engine import config
from scaling.errors import UserError
from scaling.study import sweep
from scaling.study.plan import AXES, Compiler, Plan, Request, plan

REMAT = ("none", "dots", "full")  # each recomputes more than the one before, and needs less memory
# Runs that differ only in these do the same work.
SAME = ("train.seed", "optimizer.learning_rate", "optimizer.weight_decay", "objective.label_dropout")


def mesh_of(text: str) -> dict[str, int]:
    """{"data": 2, ...} of "data=2,fsdp=8"; axes left out are 1.

    Raises: UserError for what is no such list.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise UserError(f"mesh={text!r}: must be like data=2,fsdp=8,tensor=1 (axes {', '.join(AXES)})")
        sizes[axis] = int(size)
    return sizes


def with_mesh(request: Request, mesh: Mapping[str, int], remat: str | None = None) -> Request:
    """The request on another mesh, and with another remat policy where one is given."""
    added = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    added += [f"model.remat={remat}"] if remat else []
    return dataclasses.replace(request, overrides=[*request.overrides, *added])


def checked(request: Request) -> tuple[Request, config.Config]:
    """The request, with its batch in the config where it trains, and that config; nothing is compiled yet.

    Raises: UserError for a mesh that the slice has not, or that does not cut the batch.
    """
    _, torus = hardware.slice_of(request.topology)
    if request.what == "train" and request.batch:
        overrides = [*request.overrides, f"data.batch_size={request.batch}"]
        request = dataclasses.replace(request, overrides=overrides)
    cfg, chips = config.load(request.config, request.overrides), math.prod(torus)
    sizes = cfg.mesh.over(chips)
    if sizes is None:
        shown = ", ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(cfg.mesh).items())
        raise UserError(f"mesh {shown}: must multiply to the {chips} chips of {request.topology}")
    ways, batch = sizes["data"] * sizes["fsdp"], request.batch or cfg.data.batch_size
    if batch % ways:
        raise UserError(
            f"batch={batch}: must be a multiple of mesh data x fsdp = {ways}; give --global-batch"
        )
    return request, cfg


def one(compiler: Compiler, request: Request) -> Plan:
    """The plan of a request; raises UserError for bad input, before anything long begins."""
    request, cfg = checked(request)
    made = plan(compiler, request)
    made.batch = request.batch or cfg.data.batch_size
    made.remat = str(cfg.model.options.get("remat", "none"))
    return made


# Search


def meshes(chips: int) -> Iterator[dict[str, int]]:
    """Factorisations worth trying: from all fsdp to none, alone and with 2 or 4 chips to a tensor."""
    for tensor in (1, *(t for t in (2, 4) if chips % t == 0 and t < chips)):
        rest = chips // tensor
        for fsdp in sorted({rest, math.gcd(rest, 32), math.gcd(rest, 8), 1}, reverse=True):
            if tensor == 1 or fsdp == rest:
                yield {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}


def search(compiler: Compiler, request: Request) -> list[Plan]:
    """Plans that fit, the fastest per example first: over meshes, the batch and twice it, and remat.

    Of each mesh and batch the policy that recomputes least and fits; if none does, what it lacks.

    Raises: UserError where nothing fits, with the smallest slice on which it would.
    """
    _, torus = hardware.slice_of(request.topology)
    batch = request.batch or config.load(request.config, request.overrides).data.batch_size
    tried: list[Plan] = []
    choices = list(itertools.product(meshes(math.prod(torus)), (batch, 2 * batch)))
    for mesh, size in tqdm(choices, desc="plans"):
        if size % (mesh["data"] * mesh["fsdp"]):
            continue
        for remat in REMAT:
            asked = dataclasses.replace(with_mesh(request, mesh, remat), batch=size)
            tried.append(one(compiler, asked))
            if tried[-1].fits:
                break
    fitting = sorted((p for p in tried if p.fits), key=lambda p: p.step_time_ms / p.batch)
    if not fitting:
        raise UserError(_too_large(compiler, request, tried, batch))
    return fitting


def _too_large(compiler: Compiler, request: Request, tried: Sequence[Plan], batch: int) -> str:
    if not tried:
        return f"batch={batch}: no mesh of {request.topology} divides it; give another --global-batch"
    best = min(tried, key=lambda p: p.hbm_gib_needed)
    lacks = best.hbm_gib_needed - best.hbm_gib_available
    said = f"topology={request.topology}: does not fit; at best {lacks:.1f} GiB a chip are lacking"
    for larger in larger_slices(request.topology):
        chips = math.prod(hardware.slice_of(larger)[1])
        mesh = {"data": 1, "fsdp": chips, "tensor": 1}
        asked = with_mesh(request, mesh, "full")
        asked = dataclasses.replace(asked, topology=larger, batch=batch)
        if batch % chips == 0 and one(compiler, asked).fits:
            return f"{said}; the smallest slice on which it fits is {larger}"
    return f"{said}, and it fits on no larger slice with this batch"


def larger_slices(topology: str) -> Iterator[str]:
    """The same chip's slices with twice the chips each, up to 256; of GPUs, a node."""
    kind, shape = topology.partition(":")[0], list(hardware.slice_of(topology)[1])
    most = hardware.NODE if kind in hardware.GPUS else 256
    while 2 * math.prod(shape) <= most:
        shape[shape.index(min(shape))] *= 2
        yield f"{kind}:{'x'.join(map(str, sorted(shape)))}"


# Studies


def study(compiler: Compiler, folder: Path, request: Request) -> list[tuple[str, Plan]]:
    """(name, plan) of each run of a study; runs that do the same work are compiled once."""
    loaded = sweep.load(folder)
    asked = [
        dataclasses.replace(
            request,
            config=loaded.config_of(run),
            overrides=[*(f"{key}={value!r}" for key, value in run.items()), *request.overrides],
        )
        for run in loaded.sweep
    ]
    for each in asked:
        checked(each)
    known: dict[str, Plan] = {}
    names, rows = sweep.run_names(loaded.sweep), []
    for name, run, each in tqdm(list(zip(names, loaded.sweep, asked, strict=True)), desc="runs"):
        work = repr(sorted((key, value) for key, value in run.items() if key not in SAME))
        if work not in known:
            known[work] = one(compiler, each)
        rows.append((name, known[work]))
    return rows


# Words


def as_json(rows: Sequence[tuple[str, Plan]]) -> list[dict[str, Any]]:
    """Plans by name."""
    return [{"run": name, **dataclasses.asdict(each)} for name, each in rows]


def described(made: Plan) -> str:
    """What a search varies."""
    mesh = [f"{axis}={size}" for axis, size in made.mesh.items() if size > 1]
    return " ".join([*mesh, f"batch={made.batch}", f"remat={made.remat}"])


def text(made: Plan, price: float | None) -> str:
    """A plan as lines to read."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in made.mesh.items())
    lines = [f"{made.topology}: {made.chips} chips, {mesh}, batch {made.batch}, remat {made.remat}"]
    room = f"{made.hbm_gib_needed:.2f} of {made.hbm_gib_available} GiB a chip"
    if not made.fits:
        lacks = made.hbm_gib_needed - made.hbm_gib_available
        return "\n".join([*lines, f"memory    {room}: does not fit, {lacks:.2f} GiB are lacking"])
    parts = ", ".join(f"{name} {size:.2f}" for name, size in made.hbm_gib.items())
    lines.append(f"memory    {room} ({parts})")
    ratio = "" if made.work_ratio is None else f", {made.work_ratio:.2f} times the model's own"
    lines.append(f"products  {made.tera_macs:.3f} tera multiply-adds a chip and step{ratio}")
    for row in made.collectives:
        lines.append(
            f"network   {row['kind']} over {row['axes']}: {row['count']:.0f} times, "
            f"{row['bytes'] / 2**20:,.1f} MiB, {row['ms']:.2f} ms"
        )
    terms = ", ".join(f"{name} {ms:.2f}" for name, ms in made.milliseconds.items())
    lines.append(f"time, ms  {terms}")
    mfu = "" if made.mfu is None else f", MFU {made.mfu:.2f}"
    lines.append(f"step      {made.step_time_ms:.2f} ms (a model's estimate, not measured){mfu}")
    if made.chip_hours is not None:
        cost = "" if price is None else f", {price * made.chip_hours:,.0f} at {price} a chip-hour"
        lines.append(
            f"run       {made.steps:,} steps: {made.hours:,.2f} h, {made.chip_hours:,.1f} chip-hours{cost}"
        )
    return "\n".join([*lines, *(f"note      {note}" for note in made.notes)])


def table(rows: Sequence[tuple[str, Plan]], price: float | None) -> str:
    """Plans, a line each, and what there is to be said of them."""
    lines = [f"{'run':40} {'GiB':>6} {'fits':>4} {'ms':>9} {'MFU':>5} {'hours':>8} {'chip-hours':>11}"]
    lines[0] += "" if price is None else f" {'cost':>11}"
    for name, made in rows:
        mfu, hours = made.mfu or math.nan, made.hours if made.hours is not None else math.nan
        lines.append(
            f"{name[:40]:40} {made.hbm_gib_needed:6.1f} {'yes' if made.fits else 'no':>4} "
            f"{made.step_time_ms:9.2f} {mfu:5.2f} {hours:8.2f} {hours * made.chips:11.1f}"
        )
        lines[-1] += "" if price is None else f" {price * hours * made.chips:11,.0f}"
    return "\n".join([*lines, *dict.fromkeys(f"note: {note}" for _, made in rows for note in made.notes)])


def total(rows: Sequence[tuple[str, Plan]], price: float | None) -> str:
    """What all runs of a study take."""
    known = [made for _, made in rows if made.chip_hours is not None]
    chip_hours, hours = (sum(getattr(made, k) for made in known) for k in ("chip_hours", "hours"))
    cost = "" if price is None else f", {price * chip_hours:,.0f} at {price} a chip-hour"
    return (
        f"{len(known)} of {len(rows)} runs: {chip_hours:,.1f} chip-hours{cost};\n"
        f"one after the other on this slice {hours / 24:,.2f} days (a model's estimate)"
    )
