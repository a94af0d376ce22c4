"""Reports of plans: text, tables and JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from scaling.plan.step_time import Plan

# Printed beside every step time.
ESTIMATE = (
    "a model's estimate, not measured; latencies, waits for the host and traffic between slices are not in it"
)


def as_json(rows: Sequence[tuple[str, Plan]]) -> list[dict[str, Any]]:
    """Returns plans with their names, ready for `json.dumps`."""
    return [{"run": name, **dataclasses.asdict(each)} for name, each in rows]


def described(plan: Plan) -> str:
    """Returns a name made of what a search varies: mesh, batch and remat policy."""
    mesh = [f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1]
    return " ".join([*mesh, f"batch={plan.batch}", f"remat={plan.remat}"])


def text(plan: Plan, price: float | None) -> str:
    """Returns a plan as lines to read; `price` is that of one chip-hour."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    chips = "1 chip" if plan.chips == 1 else f"{plan.chips} chips"
    lines = [f"{plan.topology}: {chips}, {mesh}, batch {plan.batch}, remat {plan.remat}"]
    memory = f"{plan.hbm_gib_needed:.2f} of {plan.hbm_gib_available} GiB per chip"
    if not plan.fits:
        lacks = plan.hbm_gib_needed - plan.hbm_gib_available
        lines.append(f"memory    {memory}: does not fit, {lacks:.2f} GiB are lacking")
        hint = "--search tries meshes, and says on which slice it fits"
        return "\n".join([*lines, *(f"note      {note}" for note in [*plan.notes, hint])])
    parts = ", ".join(f"{name} {size:.2f}" for name, size in plan.hbm_gib.items())
    lines.append(f"memory    {memory} ({parts}), {plan.hbm_gib_moved:,.1f} GiB read and written")
    ratio = "" if plan.work_ratio is None else f", {plan.work_ratio:.2f} times the model's own"
    lines.append(f"matmuls   {plan.tera_macs:.3f} tera multiply-adds per chip and step{ratio}")
    for row in plan.collectives:
        lines.append(
            f"network   {row['kind']} over {row['axes']}: {row['count']:.0f} times, "
            f"{row['bytes'] / 2**20:,.1f} MiB, {row['ms']:.2f} ms"
        )
    terms = ", ".join(f"{name} {ms:.2f}" for name, ms in plan.milliseconds.items())
    lines.append(f"time, ms  {terms}")
    mfu = "" if plan.mfu is None else f", MFU {plan.mfu:.2f}"
    lines.append(
        f"step      {plan.step_time_ms:.2f} ms, {plan.examples_per_second:,.1f} examples per second{mfu}"
    )
    lines.append(f"          {ESTIMATE}")
    if plan.what != "train" and price is not None:
        lines.append(f"cost      {_cost(plan, price):,.2f} per million examples at {price} per chip-hour")
    if plan.chip_hours is not None:
        cost = "" if price is None else f", {_cost(plan, price):,.0f} at {price} per chip-hour"
        lines.append(
            f"run       {plan.steps:,} steps: {plan.hours:,.2f} h, {plan.chip_hours:,.1f} chip-hours{cost}"
        )
    return "\n".join([*lines, *(f"note      {note}" for note in plan.notes)])


def _cost(plan: Plan, price: float) -> float | None:
    """Returns the cost of a training run, or of a million examples evaluated or sampled; None if unknown."""
    hours = plan.chip_hours
    if plan.what != "train" and plan.examples_per_second:
        hours = plan.chips * 1e6 / 3600 / plan.examples_per_second
    return None if hours is None else price * hours


# Column -> (width, format).
COLUMNS = {
    "GiB": (8, ".1f"), "fits": (5, ""), "ms": (10, ".2f"), "examples/s": (12, ",.1f"), "MFU": (6, ".2f"),
    "hours": (9, ".2f"), "chip-hours": (12, ",.1f"), "cost": (12, ",.2f"),
}  # fmt: skip


def table(rows: Sequence[tuple[str, Plan]], price: float | None) -> str:
    """Returns a table with one line per plan, and their notes; `price` is that of one chip-hour."""
    lines = [f"{'run':40}" + "".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items())]
    for name, plan in rows:
        fits, cost = "yes" if plan.fits else "no", None if price is None else _cost(plan, price)
        values = [plan.hbm_gib_needed, fits, plan.step_time_ms, plan.examples_per_second, plan.mfu]
        values += [plan.hours, plan.chip_hours, cost]
        columns = zip(values, COLUMNS.values(), strict=True)
        cells = (
            f"{'-' if value is None else format(value, form):>{width}}" for value, (width, form) in columns
        )
        lines.append(f"{name[:40]:40}" + "".join(cells))
    notes = dict.fromkeys(f"note: {note}" for _, plan in rows for note in plan.notes)
    if price is not None and any(plan.what != "train" for _, plan in rows):
        notes["note: cost is per million examples"] = None
    return "\n".join([*lines, *notes])


def summed(rows: Sequence[tuple[str, Plan]], price: float | None) -> str:
    """Returns the total time and cost of those runs of a study that fit; `price` is that of one chip-hour."""
    timed = [plan for _, plan in rows if plan.fits and plan.chip_hours is not None]
    chip_hours, hours = (sum(getattr(plan, k) for plan in timed) for k in ("chip_hours", "hours"))
    cost = "" if price is None else f", {price * chip_hours:,.0f} at {price} per chip-hour"
    return (
        f"{len(timed)} of {len(rows)} runs: {chip_hours:,.1f} chip-hours{cost};\n"
        f"one after the other on this slice {hours / 24:,.2f} days, training alone;\n"
        f"{ESTIMATE}"
    )
