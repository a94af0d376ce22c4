"""How many images a second are sampled: a call is the whole loop, guided in one doubled batch.

    python experiments/speed/sample.py                                               two CPU threads, float32
    python experiments/speed/sample.py --cases DiT-XL/2 --steps 250 --dtype bfloat16 --threads 0     a GPU

Calls take turns with matmuls of square matrices; the share is of their rate. DDPM, as in the paper.
"""

import argparse
import os
import statistics

from cases import CASES, Case
from timing import spread, timed
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    dits = [name for name in CASES if name.startswith("DiT")]
    parser.add_argument("--cases", nargs="*", default=["DiT-S/4"], choices=dits)
    parser.add_argument("--images", type=int, default=50, help="a call")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; 0 for all")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax
    import matmuls
    import ours

    from scaling.run.cost import run_cost

    print("| model | images a call | steps | seconds a call, median (range) | images/s | share of rate |")
    print("| --- | --- | --- | --- | --- | --- |")
    multiply = matmuls.step(args.dtype)
    for name in args.cases:
        sampling = (f"sampling.steps={args.steps}", "sampling.integrator='ddpm'")
        made = ours.run(Case(CASES[name].config, sampling, {}), args.images, args.dtype)
        run, times, rates = ours.sampler(made), [], []
        run(1)
        for _ in tqdm(range(args.rounds), desc=name, leave=False):
            times.append(timed(run, 1))
            rates.append(matmuls.FLOPS / timed(multiply, 10))
        work = 2 * 1e9 * (run_cost(made)["gflops"] or 0.0) * args.steps * args.images
        share = work / statistics.median(times) / statistics.median(rates)
        made_a_second = [args.images / seconds for seconds in times]
        shown = f"{spread(times, 1, '{:.1f}')} | {spread(made_a_second, 1, '{:.2f}')} | {share:.2f}"
        print(f"| {name} | {args.images} | {args.steps} | {shown} |", flush=True)
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
