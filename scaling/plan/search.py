"""Comparisons of plans: over meshes, batches and remat policies of one run, and over the runs of a study."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scaling.errors import UserError
from scaling.parallel.mesh import AXES
from scaling.plan import hardware
from scaling.plan.compiler import Compiler, Request
from scaling.plan.step_time import Plan, plan
from scaling.progress import track
from scaling.run.build import TRACED
from scaling.run.options import Config
from scaling.study import sweep
from scaling.training import config

REMAT = ("none", "dots", "full")  # each policy recomputes more than the one before, and needs less memory


def mesh_of(text: str) -> dict[str, int]:
    """Returns {"data": 2, ...} given "data=2,fsdp=8"; axes left out are 1.

    Raises:
        UserError: if the text is no such list.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(f"mesh={text!r}: must be like data=2,fsdp=8,tensor=1 (axes {', '.join(AXES)})")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def with_mesh(request: Request, mesh: Mapping[str, int], remat: str | None = None) -> Request:
    """Returns the request on another mesh, and with another remat policy if one is given."""
    overrides = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    overrides += [f"model.remat={remat}"] if remat else []
    return dataclasses.replace(request, overrides=[*request.overrides, *overrides])


def checked(request: Request) -> tuple[Request, Config]:
    """Returns the request, with its batch in the config if it trains, and that config; nothing is compiled.

    Raises:
        UserError: if the mesh does not fit the slice, or does not divide the batch.
    """
    if request.what == "train" and request.batch:
        overrides = [*request.overrides, f"data.batch_size={request.batch}"]
        request = dataclasses.replace(request, overrides=overrides)
    cfg = config.load(request.config, request.overrides)
    sizes = over_slice(cfg, request.topology)
    batch = request.batch or cfg.data.batch_size
    if not _divides(sizes, batch):
        ways = sizes["data"] * sizes["fsdp"]
        raise UserError(
            f"batch={batch}: must be a multiple of mesh data x fsdp = {ways}; give --global-batch"
        )
    return request, cfg


def over_slice(cfg: Config, topology: str) -> dict[str, int]:
    """Returns the sizes of the config's mesh on a slice.

    Raises:
        UserError: if they do not multiply to the number of chips.
    """
    chips = math.prod(hardware.slice_of(topology)[1])
    sizes = cfg.mesh.over(chips)
    if sizes is None:
        mesh = ", ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(cfg.mesh).items())
        raise UserError(f"mesh {mesh}: must multiply to the {chips} chips of {topology}")
    return sizes


def one(compiler: Compiler, request: Request) -> Plan:
    """Returns the plan of a request; bad input is a UserError before anything is compiled."""
    request, cfg = checked(request)
    result = plan(compiler, request)
    result.remat = str(cfg.model.options.get("remat", "none"))
    return result


# Search


def meshes(chips: int) -> Iterator[dict[str, int]]:
    """Yields meshes worth trying: fsdp over all chips or over 32, 16, ..., 1 of them; or tensor 2 or 4."""
    for fsdp in sorted({chips, *(n for n in (32, 16, 8, 4, 2, 1) if chips % n == 0)}, reverse=True):
        yield {"data": chips // fsdp, "fsdp": fsdp, "tensor": 1}
    for tensor in (2, 4):
        if chips % tensor == 0 and tensor < chips:
            yield {"data": 1, "fsdp": chips // tensor, "tensor": tensor}


def search(compiler: Compiler, request: Request) -> list[Plan]:
    """Returns the plans that fit, fastest per example first, over meshes, two batches and remat policies.

    The batches are the request's and twice it. For each mesh and batch, the policy is the one that recomputes
    least among those that fit. A mesh or a policy among the overrides is the only one that is tried.

    Raises:
        UserError: if no mesh divides the batch, or nothing fits; then with the memory that is lacking and,
            unless the overrides set the mesh, the smallest slice on which the run would fit.
    """
    cfg = config.load(request.config, request.overrides)
    batch = request.batch or cfg.data.batch_size
    remat: tuple[str, ...] = REMAT
    if any(each.startswith("model.remat=") for each in request.overrides):
        remat = (str(cfg.model.options["remat"]),)
    pinned = any(each.startswith("mesh.") for each in request.overrides)
    if pinned:
        candidates = [over_slice(cfg, request.topology)]
    else:
        candidates = list(meshes(math.prod(hardware.slice_of(request.topology)[1])))
    sizes = (batch, 2 * batch)
    choices = [(mesh, size) for mesh in candidates for size in sizes if pinned or _divides(mesh, size)]
    if not choices:
        raise UserError(
            f"batch={batch}: no mesh of {request.topology} divides it; give another --global-batch"
        )
    plans = [
        _first_that_fits(compiler, request, mesh, size, remat)
        for mesh, size in track(choices, "plans", len(choices), "plan")
    ]
    fitting = sorted((p for p in plans if p.fits), key=lambda p: p.step_time_ms / p.batch)
    if fitting:
        return fitting
    best = min(plans, key=lambda p: p.hbm_gib_needed)
    lacks = f"{best.hbm_gib_needed - best.hbm_gib_available:.1f} GiB per chip are lacking"
    message = f"topology={request.topology}: does not fit; at best {lacks}"
    if pinned:
        raise UserError(f"{message} on this mesh; without one --search tries others")
    raise UserError(f"{message}; {_smallest_slice(compiler, request, batch, remat[-1])}")


def _divides(mesh: Mapping[str, int], batch: int) -> bool:
    return batch % (mesh["data"] * mesh["fsdp"]) == 0


def _first_that_fits(
    compiler: Compiler, request: Request, mesh: Mapping[str, int], batch: int, remat: Sequence[str]
) -> Plan:
    """Returns the plan with the first policy that fits, or else with the last."""
    for policy in remat:
        result = one(compiler, dataclasses.replace(with_mesh(request, mesh, policy), batch=batch))
        if result.fits:
            break
    return result


def _smallest_slice(compiler: Compiler, request: Request, batch: int, remat: str) -> str:
    """Returns, in words, the smallest larger slice on which a run fits.

    On each slice two meshes are tried: of those that divide the batch, the two with the largest fsdp.
    """
    kind, (chip, torus) = request.topology.partition(":")[0], hardware.slice_of(request.topology)
    larger = [sides for sides in hardware.slices(chip) if math.prod(sides) > math.prod(torus)]
    for sides in track(larger, "larger slices", len(larger), "slice"):
        topology = f"{kind}:{'x'.join(map(str, sides))}"
        able = (mesh for mesh in meshes(math.prod(sides)) if mesh["tensor"] == 1 and _divides(mesh, batch))
        for mesh in itertools.islice(able, 2):
            moved = dataclasses.replace(request, topology=topology, batch=batch)
            if one(compiler, with_mesh(moved, mesh, remat)).fits:
                return f"the smallest slice on which it fits is {topology}"
    chips = math.prod(hardware.slices(chip)[-1])
    return f"no larger slice, of up to {chips} chips, was found on which it fits with this batch"


# Studies


def study(compiler: Compiler, folder: Path, request: Request) -> list[tuple[str, Plan]]:
    """Returns (name, plan) for each run of a study; runs that do the same work are compiled once."""
    loaded = sweep.load(folder)
    requests = [
        dataclasses.replace(
            request,
            config=loaded.config_of(run),
            overrides=[*(f"{key}={value!r}" for key, value in run.items()), *request.overrides],
        )
        for run in loaded.sweep
    ]
    for each in requests:
        checked(each)
    plans: dict[str, Plan] = {}
    names, rows = sweep.run_names(loaded.sweep), []
    for name, run, each in track(zip(names, loaded.sweep, requests, strict=True), "runs", len(names), "run"):
        # Runs that differ only in traced values do the same work.
        work = repr(sorted((key, value) for key, value in run.items() if key not in TRACED))
        if work not in plans:
            plans[work] = one(compiler, each)
        rows.append((name, plans[work]))
    return rows
