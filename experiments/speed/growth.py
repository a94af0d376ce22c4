"""Does a step cost what its multiply-adds say, and compilation the same at any depth? Tables in Markdown.

    python experiments/speed/growth.py

One size of DiT is varied along one axis at a time. Sizes take turns, some seconds each.
"""

import argparse
import statistics
from typing import Any

import jax
import ours
from cases import FLOW, Case
from timing import spread, timed
from tqdm import tqdm

from scaling.run import build
from scaling.run.cost import run_cost

BASE: dict[str, Any] = dict(depth=12, width=384, patch=4, batch=8)
AXES = {"depth": (3, 6, 12, 24), "width": (192, 384, 768), "patch": (8, 4, 2), "batch": (4, 8, 16, 32)}


def run(depth: int, width: int, patch: int, batch: int) -> build.Run:
    sizes = (f"model.depth={depth}", f"model.width={width}", f"model.heads={width // 64}")
    return ours.run(Case(f"configs/dit.py:S/{patch}", (*FLOW, *sizes), {}), batch, "float32")


def steps(rounds: int, seconds: float) -> list[str]:
    """Rows: milliseconds per step, and how many times what the multiply-adds make of the base's."""
    sizes = [BASE] + [{**BASE, axis: v} for axis, values in AXES.items() for v in values if v != BASE[axis]]
    runs, flops, times = [], [], [[] for _ in sizes]
    for size in tqdm(sizes, desc="compiling", leave=False):
        made = run(**size)
        runs.append(ours.step(made))
        flops.append(run_cost(made)["train_flops_per_step"] or 0.0)
        runs[-1](1)
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for one_step, found in zip(runs, times, strict=True):
            one = timed(one_step, 1)
            found.append(timed(one_step, max(1, round(seconds / one))))
    middles = [statistics.median(found) for found in times]
    rows = []
    for size, found, middle, work in zip(sizes, times, middles, flops, strict=True):
        shown = " | ".join(str(size[axis]) for axis in AXES)
        over = middle / work / (middles[0] / flops[0])
        rows.append(f"| {shown} | {work / 1e9:,.0f} | {spread(found, 1e3)} | {over:.2f} |")
    return rows


def compilation(rounds: int) -> list[str]:
    """Rows: seconds to compile the scanned step."""
    times: dict[int, list[float]] = {12: [], 28: []}
    for _ in tqdm(range(rounds), desc="compilation", leave=False):
        for depth, found in times.items():
            jax.clear_caches()
            lowered = ours.lowered(run(**{**BASE, "depth": depth}))
            found.append(timed(lambda _, lowered=lowered: lowered.compile(), 1))
    return [f"| {depth} | {spread(found, form='{:.1f}')} |" for depth, found in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    tables = ("steps", "compilation")
    parser.add_argument("--tables", nargs="*", default=tables, choices=tables)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn, about")
    args = parser.parse_args()
    if "steps" in args.tables:
        print(f"| {' | '.join(AXES)} | GFLOPs | ms per step, median (range) | over what GFLOPs predict |")
        print("| --- " * (len(AXES) + 3) + "|")
        print("\n".join([*steps(args.rounds, args.seconds), ""]), flush=True)
    if "compilation" in args.tables:
        print("| depth | seconds to compile, median (range) |\n| --- | --- |")
        print("\n".join(compilation(args.rounds)))


if __name__ == "__main__":
    main()
