"""One arm of `step.py`, a process of its own: says what it is, then takes as many steps as each line says.

python arm.py CASE ARM BATCH DTYPE
"""

import json
import sys

from cases import CASES
from timing import timed


def main() -> None:
    name, arm, batch, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    about: dict[str, float | None] = {}
    if arm == "matmuls":
        import matmuls

        about["flops"], run = matmuls.FLOPS, matmuls.step(dtype)
    elif arm.startswith("scaling"):
        import ours

        from scaling.run.cost import run_cost

        unrolled = ("model.unroll=True",) if arm.endswith("unrolled") else ()
        made = ours.run(CASES[name], batch, dtype, *unrolled)
        about, run = run_cost(made), ours.step(made)
        about["flops"] = about["train_flops_per_step"]
    else:
        import pytorch

        about["params"], run = pytorch.step(CASES[name].torch, batch, dtype, compiled="compile" in arm)
    run(2)
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(timed(run, int(line)), flush=True)


if __name__ == "__main__":
    main()
