"""Training steps of this package and of PyTorch, side by side: a table in Markdown on stdout.

    python experiments/speed/step.py                        two CPU threads, float32, batch 8
    python experiments/speed/step.py --cases DiT-XL/2 --batch 256 --dtype bfloat16 --threads 0 \\
        --arms scaling torch torch.compile              a GPU

Each arm is a process that holds its model; they take turns, a few seconds each, and rest while others run.
Needs the `parity` extra, for PyTorch, a C++ compiler, for torch.compile, and better tcmalloc, for both sides.
"""

import argparse
import ctypes.util
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from cases import CASES, ON_A_CPU
from timing import spread
from tqdm import tqdm

HERE = Path(__file__).parent
# What is fastest for a transformer on a CPU: layers unrolled, matmuls by Eigen rather than by YNNPACK.
EIGEN = "--xla_cpu_experimental_ynn_fusion_type="
ARMS = ("scaling", "scaling, unrolled", "torch", "torch.compile")


class Arm:
    """A process that takes steps when told to."""

    def __init__(self, name: str, arm: str, args: argparse.Namespace, allocator: str | None) -> None:
        env = {**os.environ, "LD_PRELOAD": allocator or "", "PYTHONPATH": str(HERE.parents[1])}
        if arm.endswith("unrolled"):
            env["XLA_FLAGS"] = EIGEN
        if args.threads:
            env["OMP_NUM_THREADS"] = str(args.threads)
        cores = sorted(os.sched_getaffinity(0))[: args.threads or None]
        command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, str(HERE / "arm.py")]
        command += [name, arm, str(args.batch), args.dtype]
        self.process = subprocess.Popen(
            command, env=env, cwd=HERE.parents[1], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.about = json.loads(self._line())
        self.steps = max(1, round(args.seconds / self.seconds(1)))

    def seconds(self, steps: int) -> float:
        """Of one step, the mean of so many."""
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"an arm ended with {self.process.wait()}; what it said stands above")
        return line

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(name: str, args: argparse.Namespace, allocator: str | None) -> list[str]:
    """The rows of one case."""
    arms: dict[str, Arm] = {}
    times: dict[str, list[float]] = {}
    try:
        for arm in tqdm(("matmuls", *args.arms), desc=f"{name}: compiling", leave=False):
            arms[arm] = Arm(name, arm, args, allocator)
        sizes = {arm: each.about["params"] for arm, each in arms.items() if arm != "matmuls"}
        if len(set(sizes.values())) > 1:
            raise SystemExit(f"{name}: the models differ: {sizes}")
        for i in tqdm(range(args.rounds), desc=f"{name}: rounds", leave=False):
            for arm, each in list(arms.items())[:: 1 if i % 2 else -1]:
                times.setdefault(arm, []).append(each.seconds(each.steps))
    finally:
        for each in arms.values():
            each.close()
    peak = arms["matmuls"].about["flops"] / statistics.median(times["matmuls"])
    ours = min((arm for arm in ARMS[:2] if arm in times), key=lambda arm: statistics.median(times[arm]))
    flops, rows = arms[ours].about["flops"], []
    for arm in args.arms:
        share = flops / statistics.median(times[arm]) / peak
        ratios = [a / b for a, b in zip(times[arm], times[ours], strict=True)]
        faster = "" if arm in ARMS[:2] else spread(ratios, 1, "{:.2f}")
        rows.append(f"| {name} | {arm} | {spread(times[arm], 1e3)} | {share:.2f} | {faster} |")
    return [
        *rows,
        f"| {name} | matmuls, {peak / 1e9:,.0f} GFLOP/s | {spread(times['matmuls'], 1e3, '{:.1f}')} | | |",
    ]


def processor() -> str:
    """Its name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=ON_A_CPU, choices=CASES)
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS, help="one of ours at least")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each arm; 0 for all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one arm's turn, about")
    args = parser.parse_args()
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "torch"))
    print(f"{datetime.date.today()}, {processor()}, {packages}, ", end="")
    print(
        f"{args.dtype}, batch {args.batch}, {args.threads or 'all'} threads, {allocator or 'no tcmalloc'}\n"
    )
    print("| model | arm | ms per step, median (range) | share of matmul rate | ours faster, times |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name in args.cases:
        print("\n".join(compare(name, args, allocator)), flush=True)


if __name__ == "__main__":
    main()
