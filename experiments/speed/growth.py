"""Does a step cost what its multiply-adds say, and compilation the same at any depth? Tables in Markdown.

    python experiments/speed/growth.py

One size of DiT is varied along one axis at a time. Sizes take turns, some seconds each.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import ours
from cases import FLOW, Case
from tqdm import tqdm

from scaling.engine import build

BASE: dict[str, Any] = dict(depth=12, width=384, patch=4, batch=8)
AXES = {"depth": (3, 6, 12, 24), "width": (192, 384, 768), "patch": (8, 4, 2), "batch": (4, 8, 16, 32)}


def case(depth: int, width: int, patch: int, batch: int = 0) -> Case:
    sizes = (f"model.depth={depth}", f"model.width={width}", f"model.heads={width // 64}")
    return Case(f"configs/dit.py:S/{patch}", (*FLOW, *sizes), {})


def steps(rounds: int, seconds: float) -> list[str]:
    """Rows: milliseconds a step, and how many times what the multiply-adds make of the base's."""
    sizes = [BASE] + [{**BASE, axis: v} for axis, values in AXES.items() for v in values if v != BASE[axis]]
    runs, flops, times = [], [], [[] for _ in sizes]
    for size in tqdm(sizes, desc="compiling", leave=False):
        made = ours.built(case(**size), size["batch"], "float32")
        runs.append(ours.step(made))
        flops.append(build.cost(made)["train_flops_per_step"] or 0.0)
        runs[-1](1)
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for run, found in zip(runs, times, strict=True):
            one = timed(run, 1)
            found.append(timed(run, max(1, round(seconds / one))))
    middles = [statistics.median(found) for found in times]
    rows = []
    for size, found, middle, work in zip(sizes, times, middles, flops, strict=True):
        shown = " | ".join(str(size[axis]) for axis in AXES)
        spread = f"{1e3 * middle:,.0f} ({1e3 * min(found):,.0f} to {1e3 * max(found):,.0f})"
        over = middle / work / (middles[0] / flops[0])
        rows.append(f"| {shown} | {work / 1e9:,.0f} | {spread} | {over:.2f} |")
    return rows


def timed(run: Callable[[int], float], count: int) -> float:
    """Seconds of one step, the mean of so many."""
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def compilation(rounds: int) -> list[str]:
    """Rows: seconds to compile the scanned step."""
    times: dict[int, list[float]] = {12: [], 28: []}
    for _ in tqdm(range(rounds), desc="compilation", leave=False):
        for depth, found in times.items():
            jax.clear_caches()
            lowered = ours.lowered(ours.built(case(depth, 384, 4), 8, "float32"))
            start = time.perf_counter()
            lowered.compile()
            found.append(time.perf_counter() - start)
    return [
        f"| {depth} | {statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f}) |"
        for depth, found in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    tables = ("steps", "compilation")
    parser.add_argument("--tables", nargs="*", default=tables, choices=tables)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one turn, about")
    args = parser.parse_args()
    if "steps" in args.tables:
        print(f"| {' | '.join(AXES)} | GFLOPs | ms a step, median (range) | over what GFLOPs predict |")
        print("| --- " * (len(AXES) + 3) + "|")
        print("\n".join([*steps(args.rounds, args.seconds), ""]), flush=True)
    if "compilation" in args.tables:
        print("| depth | seconds to compile, median (range) |\n| --- | --- |")
        print("\n".join(compilation(args.rounds)))


if __name__ == "__main__":
    main()
