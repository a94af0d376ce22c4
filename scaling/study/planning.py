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
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(f"mesh={text!r}: must be like data=2,fsdp=8,tensor=1 (axes {', '.join(AXES)})")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def with_mesh(request: Request, mesh: Mapping[str, int], remat: str | None = None) -> Request:
    """The request on another mesh, and with another remat policy where one is given."""
    added = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    added += [f"model.remat={remat}"] if remat else []
    return dataclasses.replace(request, overrides=[*request.overrides, *added])


def checked(request: Request) -> tuple[Request, config.Config]:
    """The request, with its batch in the config where it trains, and that config; nothing is compiled yet.

    Raises: UserError for a mesh that the slice has not, or that does not cut the batch.
    """
    if request.what == "train" and request.batch:
        overrides = [*request.overrides, f"data.batch_size={request.batch}"]
        request = dataclasses.replace(request, overrides=overrides)
    cfg = config.load(request.config, request.overrides)
    sizes = over_slice(cfg, request.topology)
    batch = request.batch or cfg.data.batch_size
    if not _cuts(sizes, batch):
        ways = sizes["data"] * sizes["fsdp"]
        raise UserError(
            f"batch={batch}: must be a multiple of mesh data x fsdp = {ways}; give --global-batch"
        )
    return request, cfg


def over_slice(cfg: config.Config, topology: str) -> dict[str, int]:
    """The config's mesh on a slice; raises UserError where it does not multiply to the chips."""
    chips = math.prod(hardware.slice_of(topology)[1])
    sizes = cfg.mesh.over(chips)
    if sizes is None:
        shown = ", ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(cfg.mesh).items())
        raise UserError(f"mesh {shown}: must multiply to the {chips} chips of {topology}")
    return sizes


def one(compiler: Compiler, request: Request) -> Plan:
    """The plan of a request; raises UserError for bad input, before anything long begins."""
    request, cfg = checked(request)
    made = plan(compiler, request)
    made.remat = str(cfg.model.options.get("remat", "none"))
    return made


# Search


def meshes(chips: int) -> Iterator[dict[str, int]]:
    """Factorisations worth trying: fsdp from all chips to none, by halves from 32, or 2 or 4 to a tensor."""
    for fsdp in sorted({chips, *(n for n in (32, 16, 8, 4, 2, 1) if chips % n == 0)}, reverse=True):
        yield {"data": chips // fsdp, "fsdp": fsdp, "tensor": 1}
    for tensor in (2, 4):
        if chips % tensor == 0 and tensor < chips:
            yield {"data": 1, "fsdp": chips // tensor, "tensor": tensor}


def search(compiler: Compiler, request: Request) -> list[Plan]:
    """Plans that fit, the fastest per example first: over meshes, the batch and twice it, and remat.

    Of each mesh and batch the policy that recomputes least and fits; if none does, what it lacks. A mesh or
    a policy among the overrides is the only one that is tried.

    Raises: UserError where nothing fits, with the smallest slice on which it would.
    """
    cfg = config.load(request.config, request.overrides)
    batch = request.batch or cfg.data.batch_size
    remat: tuple[str, ...] = REMAT
    if any(each.startswith("model.remat=") for each in request.overrides):
        remat = (str(cfg.model.options["remat"]),)
    pinned = any(each.startswith("mesh.") for each in request.overrides)
    if pinned:
        there = [over_slice(cfg, request.topology)]
    else:
        there = list(meshes(math.prod(hardware.slice_of(request.topology)[1])))
    choices = [(mesh, size) for mesh in there for size in (batch, 2 * batch) if pinned or _cuts(mesh, size)]
    if not choices:
        raise UserError(
            f"batch={batch}: no mesh of {request.topology} divides it; give another --global-batch"
        )
    tried = [
        _first_that_fits(compiler, request, mesh, size, remat) for mesh, size in tqdm(choices, desc="plans")
    ]
    fitting = sorted((p for p in tried if p.fits), key=lambda p: p.step_time_ms / p.batch)
    if fitting:
        return fitting
    best = min(tried, key=lambda p: p.hbm_gib_needed)
    lacks = f"{best.hbm_gib_needed - best.hbm_gib_available:.1f} GiB a chip are lacking"
    said = f"topology={request.topology}: does not fit; at best {lacks}"
    if pinned:
        raise UserError(f"{said} on this mesh; without one --search tries others")
    raise UserError(f"{said}; {_larger(compiler, request, batch, remat[-1])}")


def _cuts(mesh: Mapping[str, int], batch: int) -> bool:
    return batch % (mesh["data"] * mesh["fsdp"]) == 0


def _first_that_fits(
    compiler: Compiler, request: Request, mesh: Mapping[str, int], batch: int, remat: Sequence[str]
) -> Plan:
    """With the first policy that fits, or else the last."""
    for policy in remat:
        made = one(compiler, dataclasses.replace(with_mesh(request, mesh, policy), batch=batch))
        if made.fits:
            break
    return made


def _larger(compiler: Compiler, request: Request, batch: int, remat: str) -> str:
    """On which larger slice it fits, in words: in shards over all chips, or over the next fewer."""
    kind, (chip, torus) = request.topology.partition(":")[0], hardware.slice_of(request.topology)
    known = [sides for sides in hardware.slices(chip) if math.prod(sides) > math.prod(torus)]
    for sides in tqdm(known, desc="larger slices"):
        larger = f"{kind}:{'x'.join(map(str, sides))}"
        able = (mesh for mesh in meshes(math.prod(sides)) if mesh["tensor"] == 1 and _cuts(mesh, batch))
        for mesh in itertools.islice(able, 2):
            asked = with_mesh(dataclasses.replace(request, topology=larger, batch=batch), mesh, remat)
            if one(compiler, asked).fits:
                return f"the smallest slice on which it fits is {larger}"
    most = math.prod(hardware.slices(chip)[-1])
    return f"no larger slice, of up to {most} chips, was found on which it fits with this batch"


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

# What the step's time cannot know stands beside it.
ESTIMATE = (
    "a model's estimate, not measured; latencies, waits for the host and traffic between slices are not in it"
)


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
    chips = "1 chip" if made.chips == 1 else f"{made.chips} chips"
    lines = [f"{made.topology}: {chips}, {mesh}, batch {made.batch}, remat {made.remat}"]
    room = f"{made.hbm_gib_needed:.2f} of {made.hbm_gib_available} GiB a chip"
    if not made.fits:
        lacks = made.hbm_gib_needed - made.hbm_gib_available
        lines.append(f"memory    {room}: does not fit, {lacks:.2f} GiB are lacking")
        hint = "--search tries meshes, and says on which slice it fits"
        return "\n".join([*lines, *(f"note      {note}" for note in [*made.notes, hint])])
    parts = ", ".join(f"{name} {size:.2f}" for name, size in made.hbm_gib.items())
    lines.append(f"memory    {room} ({parts}), {made.hbm_gib_moved:,.1f} GiB read and written")
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
    lines.append(
        f"step      {made.step_time_ms:.2f} ms, {made.examples_per_second:,.1f} examples a second{mfu}"
    )
    lines.append(f"          {ESTIMATE}")
    if made.what != "train" and price is not None:
        lines.append(f"cost      {_cost(made, price):,.2f} a million examples at {price} a chip-hour")
    if made.chip_hours is not None:
        cost = "" if price is None else f", {_cost(made, price):,.0f} at {price} a chip-hour"
        lines.append(
            f"run       {made.steps:,} steps: {made.hours:,.2f} h, {made.chip_hours:,.1f} chip-hours{cost}"
        )
    return "\n".join([*lines, *(f"note      {note}" for note in made.notes)])


def _cost(made: Plan, price: float) -> float | None:
    """Of a training run, or of a million examples that are evaluated or sampled; None where unknown."""
    hours = made.chip_hours
    if made.what != "train" and made.examples_per_second:
        hours = made.chips * 1e6 / 3600 / made.examples_per_second
    return None if hours is None else price * hours


COLUMNS = {
    "GiB": (8, ".1f"), "fits": (5, ""), "ms": (10, ".2f"), "examples/s": (12, ",.1f"), "MFU": (6, ".2f"),
    "hours": (9, ".2f"), "chip-hours": (12, ",.1f"), "cost": (12, ",.2f"),
}  # fmt: skip


def table(rows: Sequence[tuple[str, Plan]], price: float | None) -> str:
    """Plans, a line each, and what there is to be said of them."""
    lines = [f"{'run':40}" + "".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items())]
    for name, made in rows:
        fits, cost = "yes" if made.fits else "no", None if price is None else _cost(made, price)
        values = [made.hbm_gib_needed, fits, made.step_time_ms, made.examples_per_second, made.mfu]
        values += [made.hours, made.chip_hours, cost]
        cells = zip(values, COLUMNS.values(), strict=True)
        shown = (
            f"{'-' if value is None else format(value, form):>{width}}" for value, (width, form) in cells
        )
        lines.append(f"{name[:40]:40}" + "".join(shown))
    notes = dict.fromkeys(f"note: {note}" for _, made in rows for note in made.notes)
    if price is not None and any(made.what != "train" for _, made in rows):
        notes["note: cost is of a million examples"] = None
    return "\n".join([*lines, *notes])


def summed(rows: Sequence[tuple[str, Plan]], price: float | None) -> str:
    """What all runs of a study take that fit."""
    known = [made for _, made in rows if made.fits and made.chip_hours is not None]
    chip_hours, hours = (sum(getattr(made, k) for made in known) for k in ("chip_hours", "hours"))
    cost = "" if price is None else f", {price * chip_hours:,.0f} at {price} a chip-hour"
    return (
        f"{len(known)} of {len(rows)} runs: {chip_hours:,.1f} chip-hours{cost};\n"
        f"one after the other on this slice {hours / 24:,.2f} days, training alone;\n"
        f"{ESTIMATE}"
    )
