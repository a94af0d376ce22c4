"""`scaling evaluate RUN --watch`: measures each new checkpoint beside training, in a process of its own."""

import time
from pathlib import Path

import jax

from scaling.errors import UserError
from scaling.progress import say
from scaling.run import build, restore
from scaling.run.evaluation_log import EvaluationLog
from scaling.run.folder import read_status, steps_in
from scaling.run.helpers import RunHelpers
from scaling.training.evaluate import check_all, prepare_all

POLL_SECONDS = 5.0  # between two looks at the folder


def watch(folder: Path, poll_seconds: float = POLL_SECONDS) -> None:
    """Measures every checkpoint of a run, old and new, until the run is done and its last one is measured.

    It runs the evaluators that training leaves out (`in_training=False`), and appends their values to
    `evaluations.jsonl`. A checkpoint that is deleted before its turn is passed over. The same command resumes
    an interrupted one.

    Raises:
        UserError: if training leaves out no evaluator, or another process evaluates the run.
    """
    if jax.process_count() > 1:
        raise UserError("watch: is one process; start it on one host")
    run = build.described_run(folder)
    left = {name: evaluator for name, evaluator in check_all(run).items() if not evaluator.in_training}
    if not left:
        raise UserError(
            f"run={folder}: training measures every evaluator itself; set evaluators.NAME.in_training=False "
            "for those to watch with"
        )
    measures = prepare_all(left, run, folder, RunHelpers(run, folder))
    with EvaluationLog(folder) as log:
        measured = {(event["step"], event.get("evaluator")) for event in log.events()}
        while True:
            status = read_status(folder) or {}  # before the steps are listed
            steps = [
                step
                for step in steps_in(folder / "checkpoints")
                if any((step, name) not in measured for name in left)
            ]
            for step in steps:
                weights = _weights(folder, run, step)
                for name, measure in measures.items():
                    if weights is not None and (step, name) not in measured:
                        values = measure(weights, step)
                        log.append(step, name, values)
                        text = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
                        say(f"{folder.name}: step {step}: {text or name}")
                    measured.add((step, name))
            if status.get("status") == "done" and not steps:
                return
            time.sleep(0.0 if steps else poll_seconds)


def _weights(folder: Path, run: build.Run, step: int) -> dict[str, object] | None:
    """Returns the weights of a checkpoint, or None if training has deleted it meanwhile."""
    try:
        return restore.restore_run(folder, run.mesh, step).weights
    except UserError:
        if step in steps_in(folder / "checkpoints"):
            raise
        say(f"{folder.name}: step {step}: was deleted before it was measured")
        return None
