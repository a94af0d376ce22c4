"""Stands in for `python -m scaling.worker`: the same jobs, run folder and manners, no training.

`train.seed` 13 ends in a NaN loss, 14 dies by SIGKILL at its first start, 15 ends before it has a status.
"""

import json
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path

from scaling.processes import start_time
from scaling.worker import serve

STEPS = int(os.environ.get("FAKE_STEPS", "4"))
SECONDS = float(os.environ.get("FAKE_SECONDS", "0.01"))  # a step


def train(arguments: list[str]) -> int:
    config = next(a.partition("=")[2] for a in arguments if a.startswith("--config="))
    pairs = dict(a.removeprefix("--config.").split("=", 1) for a in arguments if a.startswith("--config."))
    folder = Path(arguments[arguments.index("--workdir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    seed = int(pairs.get("train.seed", "0"))
    if seed == 15:
        print("error: no such data", file=sys.stderr)
        return 2
    status = folder / "status.json"
    step = json.loads(status.read_text())["step"] if status.exists() else 0
    with (folder / "starts.jsonl").open("a") as file:
        start = {"step": step, "cores": sorted(os.sched_getaffinity(0)), "pairs": pairs, "config": config}
        start["pid"], start["cache"] = os.getpid(), os.environ.get("JAX_COMPILATION_CACHE_DIR")
        file.write(json.dumps({**start, "time": time.time()}) + "\n")
    rate = float(pairs.get("optimizer.learning_rate", "0.01"))
    off = 1 + abs(math.log10(rate / 0.01))  # the metric is lowest at a rate of 0.01
    first = len((folder / "starts.jsonl").read_text().splitlines()) == 1

    def write(state: str, reason: str | None = None) -> None:
        value = {"status": state, "step": step, "steps": STEPS, "reason": reason, "pid": os.getpid()}
        value |= {"host": socket.gethostname(), "heartbeat": time.time()}
        value["pid_started"] = start_time(os.getpid())
        (folder / ".status").write_text(json.dumps(value))
        (folder / ".status").replace(status)

    stop: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda s, _: stop.append(s))
    cost = {
        "params": 100 + seed,
        "gmacs": 0.001 * (1 + seed),
        "gflops": 0.002,
        "tokens": 4,
        "train_flops_per_step": 6e9,
    }
    config_of = {"train": {"seed": seed}, "optimizer": {"learning_rate": rate}}
    whole = {"config": config_of, "version": "0", "commit": None, "cost": cost, "model": {}}
    (folder / "config.json").write_text(json.dumps(whole))
    write("running")
    while step < STEPS:
        time.sleep(SECONDS)
        if stop:
            (folder / "signal.txt").write_text(signal.Signals(stop[0]).name)
            write("interrupted")
            return 1
        step += 1
        write("running")
        if seed == 13 and step == 2:
            write("failed", "loss is NaN at step 2")
            return 1
        if seed == 14 and step == 2 and first:
            os.kill(os.getpid(), signal.SIGKILL)
        line = {"step": step, "examples": step, "wall": step}
        trained = {**line, "event": "train", "values": {}, "in_steps": SECONDS}
        measured = {**line, "event": "evaluate", "evaluator": "fd", "values": {"fd": 10.0 * off / step}}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(f"{json.dumps(trained)}\n{json.dumps(measured)}\n")
    write("done")
    return 0


if __name__ == "__main__":
    sys.exit(serve(train))
