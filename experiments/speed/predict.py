"""Is the plan's model of a step's time right on the machine at hand? A table in Markdown.

    python experiments/speed/predict.py                                       the CPU, float32, batch 8
    python experiments/speed/predict.py --cases DiT-XL/2 --batch 256 --dtype bfloat16    a GPU

The program is compiled, read as `scaling plan` reads a TPU's, and then run. A GPU's rates are those of
`scaling.plan.hardware`; a CPU's are measured here first: square matmuls, and a large array doubled in place.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import jax
import ours
from cases import CASES, ON_A_CPU
from timing import spread, timed
from tqdm import tqdm

from scaling.plan import hardware, hlo_cost, step_time


def fastest(run: Callable[[], jax.Array]) -> float:
    """Seconds, the least of ten times."""
    return min(timed(lambda _: jax.block_until_ready(run()), 1) for _ in range(10))


def here() -> hardware.Chip:
    """The device, as a plan knows it."""
    kind = jax.devices()[0].device_kind
    if kind in hardware.CHIPS:
        return hardware.CHIPS[kind]
    square, long = jax.numpy.ones((2048, 2048)), jax.numpy.ones(2**26)
    times, double = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + a, donate_argnums=0)

    def in_place() -> jax.Array:  # memory that is new would be cleared by the system first
        nonlocal long
        long = double(long)
        return long

    flops, rate = 2 * 2048**3 / fastest(lambda: times(square)), 2 * long.nbytes / fastest(in_place)
    return hardware.Chip(kind, flops, 0.0, rate, 0.0, 0, source="measured here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=ON_A_CPU, choices=CASES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    chip = here()
    print(f"{chip.name}: {chip.flops / 1e9:,.0f} GFLOP/s, {chip.hbm_bytes / 1e9:.0f} GB/s ({chip.source})\n")
    print("| model | matmuls, ms | memory, ms | predicted, ms | measured, ms (range) | over predicted |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in tqdm(args.cases, leave=False):
        made = ours.run(CASES[name], args.batch, args.dtype)
        facts = hlo_cost.program_cost(ours.lowered(made).compile().as_text(), chip.flops, chip.hbm_bytes)
        terms = step_time.terms(dataclasses.asdict(facts), chip) | {"network": 0.0}
        predicted, run = step_time.total(terms), ours.step(made)
        run(2)
        found = [1e3 * timed(run, 2) for _ in range(7)]
        shown = f"{terms['matmuls']:.0f} | {terms['memory']:.0f} | {predicted:.0f}"
        print(
            f"| {name} | {shown} | {spread(found)} | {statistics.median(found) / predicted:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
