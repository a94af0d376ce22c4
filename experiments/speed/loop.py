"""What the training loop costs besides its step, in milliseconds: a table in Markdown.

    python experiments/speed/loop.py

A run on latents from array_record (`scaling train`: reading, drawing, logging) against its jitted step alone,
on a batch that is there already; in turns. The model is tiny, so that what is not the step can be seen: it is
the same for any model. On a CPU all of it takes its time from the step's own; beside an accelerator most of
it would hide.
"""

import argparse
import tempfile
from pathlib import Path

import inputs
import ours
from cases import FLOW, Case
from timing import spread, timed
from tqdm import tqdm

from scaling.run import config as run_config
from scaling.run.folder import read_events
from scaling.training import config, loop

SIZES = ("model.depth=1", "model.width=64", "model.heads=1", "optimizer.ema_decays=()")
STEPS, EVERY, BATCH = 600, 100, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    case = Case("configs/dit.py:S/4", (*FLOW, *SIZES), {})
    run = ours.step(ours.run(case, BATCH, "float32"))
    run(2)
    alone, whole, waited = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        section = inputs.written(folder / "latents", views=1)
        words = [*case.overrides, "model.dtype='float32'", f"data.batch_size={BATCH}", "data.workers=0"]
        words += [f"data.data_dir='{section.data_dir}'", f"train.duration='{STEPS} steps'"]
        words += [f"train.log_every={EVERY}", f"checkpoint.every='{STEPS} steps'"]
        whole_config = config.load_dict(case.config, words)
        cfg = run_config.from_dict({**whole_config, "evaluators": {}})
        for i in tqdm(range(args.rounds), desc="rounds", leave=False):
            alone.append(timed(run, STEPS - EVERY))
            loop.train(cfg, folder / str(i))
            lines = [e for e in read_events(folder / str(i)) if e["event"] == "train"]
            whole.append((lines[-1]["wall"] - lines[0]["wall"]) / (STEPS - EVERY))
            waited.append(sum(line["input_wait"] for line in lines[1:]) / (STEPS - EVERY))
    print("| | ms per step, median (range) |\n| --- | --- |")
    besides = [b - a for a, b in zip(alone, whole, strict=True)]
    named = {"jitted step alone": alone, "the loop": whole, "of it, waiting for data": waited}
    for name, found in {**named, "the loop, besides the step": besides}.items():
        print(f"| {name} | {spread(found, 1e3, '{:.2f}')} |")


if __name__ == "__main__":
    main()
