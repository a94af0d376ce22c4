"""Evaluation beside training: each checkpoint is measured once, joined by step, and not deleted meanwhile."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaling.errors import UserError
from scaling.run import reading_locks, restore
from scaling.run.checkpoint import Checkpoints
from scaling.run.evaluation_log import EvaluationLog
from scaling.run.folder import EVALUATIONS, read_evaluations, read_events
from scaling.training import config, evaluate, loop, watch


def config_with_a_watched_evaluator(tiny: dict[str, str], folder: Path) -> str:
    source = folder / "config.py"
    beside = 'beside=dict(name="linear", inputs="features", batch_size=128, in_training=False)'
    source.write_text(
        Path(tiny["vit"]).read_text().replace("evaluators=dict(", f"evaluators=dict({beside}, ")
    )
    return str(source)


@pytest.fixture
def run(tmp_path: Path, tiny: dict[str, str]) -> Path:
    loop.train(config.load(config_with_a_watched_evaluator(tiny, tmp_path)), tmp_path / "run")
    return tmp_path / "run"


def test_each_checkpoint_is_measured_once_and_joined_by_step(run: Path) -> None:
    assert {e.get("evaluator") for e in read_events(run)} == {None, "val"}  # training leaves it out
    before = {
        "event": "evaluate",
        "step": 4,
        "evaluator": "beside",
        "values": {"beside_top1": 0.25, "beside_top1_se": 0.02},
    }
    (run / EVALUATIONS).write_text(json.dumps(before) + '\n{"event": "ev')
    watch.watch(run, poll_seconds=0.1)
    lines = [json.loads(line) for line in (run / EVALUATIONS).read_text().splitlines()]
    assert [(line["step"], line["evaluator"]) for line in lines] == [(4, "beside"), (8, "beside")]
    values = evaluate.evaluate(run)
    joined = read_evaluations(run)
    assert joined[4]["beside_top1"] == 0.25 and joined[4].keys() == joined[8].keys() == values.keys()
    assert joined[8] == pytest.approx(values, rel=1e-5)
    watch.watch(run, poll_seconds=0.1)
    assert len((run / EVALUATIONS).read_text().splitlines()) == 2
    with EvaluationLog(run), pytest.raises(UserError, match=r"another process is evaluating it"):
        watch.watch(run)


def test_an_old_checkpoint_is_measured_too(run: Path) -> None:
    logged = {e["step"]: e["values"] for e in read_events(run) if e["event"] == "evaluate"}
    for step in (4, 8):
        found = evaluate.evaluate(run, checkpoint=step)
        assert {k: found[k] for k in logged[step]} == pytest.approx(logged[step], rel=1e-5)
    assert logged[4] != logged[8]
    with pytest.raises(UserError, match=r"^checkpoint=5: .*checkpoints has 4, 8; choose one of them$"):
        evaluate.evaluate(run, checkpoint=5)


def test_training_measures_what_nobody_watches(tmp_path: Path, tiny: dict[str, str]) -> None:
    loop.train(config.load(tiny["vit"]), tmp_path)
    with pytest.raises(UserError, match=r"training measures every evaluator itself"):
        watch.watch(tmp_path)


def test_a_checkpoint_that_is_being_read_is_not_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=1) as checkpoints:

        def save(step: int) -> set[str]:
            checkpoints.save(step, {"x": np.arange(3) + step}, {"step": step})
            checkpoints.wait()
            return {path.name for path in folder.iterdir() if path.name.isdigit()}

        assert save(1) == {"1"}
        with reading_locks.held(folder / "1"):
            assert save(2) == {"1", "2"} and reading_locks.read_steps(folder) == {1}
            assert save(3) == {"1", "3"}
        assert not (tmp_path / "reading").exists()
        assert save(4) == {"4"}
        (tmp_path / "reading").mkdir()
        (tmp_path / "reading/4.1.1").touch()  # of a process that was killed
        assert save(5) == {"5"} and not list((tmp_path / "reading").iterdir())


def test_readers_hold_what_they_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    from scaling.run import checkpoint

    whole = checkpoint.try_restore

    def watched(*args: Any) -> Any:
        seen.append(reading_locks.read_steps(run / "checkpoints"))
        return whole(*args)

    monkeypatch.setattr(checkpoint, "try_restore", watched)
    restore.restore_run(run)
    assert seen == [{8}]


@pytest.mark.slow
def test_it_measures_while_training_goes_on(
    tmp_path: Path, tiny: dict[str, str], start: Callable[..., Any]
) -> None:
    """Two processes, as a user starts them: training with five checkpoints of which one stays; a watcher."""
    source = config_with_a_watched_evaluator(tiny, tmp_path)
    words = ["train", f"--config={source}", f"--workdir={tmp_path / 'run'}"]
    words += ["--config.train.duration=400 steps", "--config.checkpoint.every=20 %"]
    words += ["--config.checkpoint.keep=1"]
    training = start(*words)
    while not (tmp_path / "run/config.json").exists():
        assert training.poll() is None, training.communicate()[0]
    watcher = start("evaluate", str(tmp_path / "run"), "--watch")
    for process in (training, watcher):
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    steps = [e["step"] for e in read_events(tmp_path / "run", EVALUATIONS)]
    assert steps == sorted(steps) and steps[-1] == 400
    assert not (tmp_path / "run/broken").exists()
