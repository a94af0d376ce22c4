"""The loop: what it writes, and that stopping it anywhere changes nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scaling.errors import UserError
from scaling.files import read_json
from scaling.overrides import flat
from scaling.processes import start_time
from scaling.run import restore
from scaling.run.folder import RunFolder, read_events
from scaling.run.options import Config
from scaling.training import config, loop
from tests.support.run_folders import status

MEASURED = {"val_loss", "val_top1", "val_top1_se", "val_top5", "val_top5_se"}  # of a classifier
Start = Callable[..., Any]
Read = Callable[[Path, Config], Any]
Tiny = dict[str, str]


def values(workdir: Path) -> list[tuple[Any, ...]]:
    """Every event of a run but its times."""
    return [(e["event"], e["step"], e["examples"], e["values"]) for e in read_events(workdir)]


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_run_leaves_what_the_run_folder_promises(tmp_path: Path, tiny: Tiny) -> None:
    cfg = config.load(tiny["vit"])
    last = loop.train(cfg, tmp_path / "run")
    described = json.loads((tmp_path / "run/config.json").read_text())
    assert flat(described["config"]) == flat(cfg.raw)
    assert described["model"] == {"depth": 1, "width": 16, "heads": 2, "patch": 4}
    assert set(described["cost"]) == {"params", "gmacs", "gflops", "tokens", "train_flops_per_step"}
    assert described["cost"]["tokens"] == 4
    assert status(tmp_path / "run") | {"heartbeat": 0} == {
        "status": "done", "step": 8, "steps": 8, "saved": 8, "host": os.uname().nodename, "pid": os.getpid(),
        "pid_started": start_time(os.getpid()), "heartbeat": 0, "reason": None,
    }  # fmt: skip
    events = read_events(tmp_path / "run")
    assert [e["step"] for e in events if e["event"] == "train"] == list(range(1, 9))
    assert all(0 <= e["input_wait"] <= e["wall"] for e in events if e["event"] == "train")
    in_steps = [e["in_steps"] for e in events if e["event"] == "train"]
    assert 0 < sum(in_steps) < events[-1]["wall"] and min(in_steps) >= 0
    trained = [e for e in events if e["event"] == "train"]
    assert [e["values"]["learning_rate"] for e in trained] == [pytest.approx(1e-3)] * 8
    assert ["examples_per_second" in e for e in trained] == [False] + [True] * 7  # the first step compiles
    assert [e["examples_per_second"] * e["in_steps"] for e in trained[1:]] == pytest.approx([16] * 7, rel=0.1)
    assert [e["step"] for e in events if e["event"] == "evaluate"] == [4, 8]
    assert events[-1]["values"].keys() == MEASURED == last.keys()
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))
    assert {int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()} == {4, 8}


def test_running_a_finished_run_again_changes_nothing(tmp_path: Path, tiny: Tiny) -> None:
    cfg = config.load(tiny["vit"])
    first = loop.train(cfg, tmp_path)
    before = values(tmp_path)
    assert loop.train(cfg, tmp_path) == first
    assert values(tmp_path) == before


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unbroken") / "run"


def command(tiny: Tiny, workdir: Path) -> list[str]:
    return ["train", f"--config={tiny['dit']}", f"--workdir={workdir}"]


def finish(process: Any, code: int = 0) -> str:
    said = process.communicate(timeout=180)[0]
    assert process.returncode == code, said
    return said


@pytest.mark.parametrize(
    "moment",
    [pytest.param("between checkpoints", marks=pytest.mark.slow), "while a checkpoint is written"],
)
def test_killed_and_resumed_is_bit_identical(
    moment: str, tmp_path: Path, unbroken: Path, tiny: Tiny, start: Start, read_state: Read
) -> None:
    """SIGKILL at a moment of no one's choosing; the same command ends with the same bits."""
    cfg = config.load(tiny["dit"])
    if not unbroken.exists():
        finish(start(*command(tiny, unbroken)))
    workdir = tmp_path / "run"
    process = start(*command(tiny, workdir))

    def reached() -> bool:
        if moment == "between checkpoints":
            return any(e["step"] >= 6 for e in read_events(workdir))
        return any("tmp" in p.name for p in (workdir / "checkpoints").glob("4.*"))

    wait_for(reached, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert status(workdir)["status"] == "running"
    assert values(workdir) != values(unbroken)
    finish(start(*command(tiny, workdir)))
    assert values(workdir) == values(unbroken)
    assert_same(read_state(workdir, cfg), read_state(unbroken, cfg))


@pytest.mark.parametrize(
    "signum",
    [signal.SIGHUP, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGINT))],
)
def test_told_to_stop_it_saves_and_the_same_command_resumes(
    signum: int, tmp_path: Path, unbroken: Path, tiny: Tiny, start: Start, read_state: Read
) -> None:
    cfg = config.load(tiny["dit"])
    if not unbroken.exists():
        finish(start(*command(tiny, unbroken)))
    process = start(*command(tiny, tmp_path))
    wait_for(lambda: any(e["step"] >= 1 for e in read_events(tmp_path)), process)
    process.send_signal(signum)
    said = finish(process, 128 + signum)
    assert "the same command resumes" in said
    left = status(tmp_path)
    assert left["status"] == "interrupted" and 0 < left["step"] < 12
    assert (tmp_path / "checkpoints" / str(left["step"])).is_dir()
    said = finish(start(*command(tiny, tmp_path)))
    assert f"resumed at step {left['step']}" in said
    assert values(tmp_path) == values(unbroken)
    assert_same(read_state(tmp_path, cfg), read_state(unbroken, cfg))


def test_interrupted_while_evaluating_it_evaluates_that_step_again(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config.load(tiny["vit"])
    loop.train(cfg, tmp_path / "unbroken")
    agreed = loop.Stop.agreed
    monkeypatch.setattr(loop.Stop, "agreed", lambda self: signal.SIGTERM if asked() else agreed(self))
    times = iter(range(1000))

    def asked() -> bool:  # once a step, then once a batch of the evaluation at step 4
        return next(times) == 5

    with pytest.raises(loop.Interrupted):
        loop.train(cfg, tmp_path / "run")
    assert status(tmp_path / "run")["step"] == 4
    assert not any(e["event"] == "evaluate" for e in read_events(tmp_path / "run"))
    monkeypatch.undo()
    loop.train(cfg, tmp_path / "run")
    assert sorted(map(str, values(tmp_path / "run"))) == sorted(map(str, values(tmp_path / "unbroken")))


def test_a_diverged_loss_stops_and_names_the_step(tmp_path: Path, tiny: Tiny) -> None:
    cfg = config.load(tiny["dit"], ["optimizer.learning_rate=1e38", "checkpoint.every=1 steps"])
    with pytest.raises(UserError, match=r"^step \d+: loss=.* the run diverged; lower optimizer") as error:
        loop.train(cfg, tmp_path)
    assert "\n" not in str(error.value)
    assert status(tmp_path)["status"] == "failed"
    assert status(tmp_path)["reason"] == str(error.value)
    failed = int(str(error.value).split()[1].rstrip(":"))
    assert all(int(p.name) < failed for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())


def test_another_config_is_refused_and_nothing_is_touched(tmp_path: Path, tiny: Tiny) -> None:
    loop.train(config.load(tiny["vit"]), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}
    with pytest.raises(UserError, match=r"holds a run with optimizer\.learning_rate=0\.001, not 0\.5"):
        loop.train(config.load(tiny["vit"], ["optimizer.learning_rate=0.5"]), tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_an_older_runs_config_is_read_in_todays_words(tmp_path: Path, tiny: Tiny) -> None:
    """Without the keys and sections that came later, and with names of before: it is resumed and restored."""
    crops = [
        "data.image_size=8",
        "data.train_transforms=('center_crop(1)',)",
        "data.eval_transforms=('center_crop(1)',)",
    ]
    cfg = config.load(tiny["vit"], crops)
    measured = loop.train(cfg, tmp_path)
    described = read_json(tmp_path / "config.json")
    assert described
    older = described["config"]
    del older["preprocessing"], older["model"]["epsilon"], older["data"]["unreadable"]
    older["data"] |= {"augment": ["center_crop_100"], "eval_transforms": ["center_crop_100"]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert loop.train(cfg, tmp_path) == measured
    restored = restore.restore_run(tmp_path).run.config
    assert dataclasses.replace(restored, raw={}, mesh=cfg.mesh) == dataclasses.replace(cfg, raw={})
    del older["optimizer"]["learning_rate"]  # whose default is another value
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"holds a run with optimizer\.learning_rate="):
        loop.train(cfg, tmp_path)


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path: Path, tiny: Tiny) -> None:
    """With a constant rate the duration may grow; what is measured may change at any time."""
    loop.train(config.load(tiny["vit"], ["train.duration=4 steps"]), tmp_path / "grown")
    longer = config.load(tiny["vit"], ["evaluators.val.batch_size=256"])
    assert loop.train(longer, tmp_path / "grown") == pytest.approx(
        loop.train(config.load(tiny["vit"]), tmp_path / "whole"), rel=1e-5
    )


def test_a_truncated_checkpoint_falls_back_to_the_newest_whole_one(
    tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str], read_state: Read
) -> None:
    cfg = config.load(tiny["vit"])
    loop.train(cfg, tmp_path / "run")
    whole = read_state(tmp_path / "run", cfg)
    for file in (tmp_path / "run/checkpoints/8/state").rglob("*"):
        if file.is_file() and file.stat().st_size > 500:
            with file.open("r+b") as f:
                f.truncate(file.stat().st_size // 2)
    loop.train(cfg, tmp_path / "run")
    assert "resumed at step 4" in capsys.readouterr().out
    assert (tmp_path / "run/broken/8").is_dir()
    assert_same(read_state(tmp_path / "run", cfg), whole)


def test_no_whole_checkpoint_is_an_error(tmp_path: Path, tiny: Tiny) -> None:
    cfg = config.load(tiny["vit"])
    loop.train(cfg, tmp_path)
    for step in ("4", "8"):
        shutil.rmtree(tmp_path / "checkpoints" / step / "state")
        (tmp_path / "checkpoints" / step / "state").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint there can be read"):
        loop.train(cfg, tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path, tiny: Tiny) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir=.*cannot be written"):
        loop.train(config.load(tiny["vit"]), tmp_path / "file/run")


def test_one_writer_at_a_time(tmp_path: Path, tiny: Tiny) -> None:
    with RunFolder(tmp_path), pytest.raises(UserError, match=r"another process is writing this run"):
        loop.train(config.load(tiny["vit"]), tmp_path)


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, tiny: Tiny, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real one: a file system of its own, filled up once the first checkpoint is on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system to fill needs root")
    try:
        words = [f"--config={tiny['vit']}", f"--workdir={disk / 'run'}", "--config.model.width=128"]
        overrides = ["model.width=128", "train.duration=4 steps"]
        loop.train(config.load(tiny["vit"], overrides), disk / "run")
        (disk / "ballast").write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 65536))
        said = finish(start("train", *words, "--config.train.duration=8 steps"), 2)
        assert "error: " in said and "free space" in said and "Traceback" not in said
        (disk / "ballast").unlink()
        loop.train(config.load(tiny["vit"], ["model.width=128", "train.duration=8 steps"]), disk / "run")
        assert "resumed at step 4" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_metrics_file_drops_a_torn_line(tmp_path: Path) -> None:
    line = '{"event": "train", "step": %d, "examples": 1, "wall": 1.5, "values": {}}\n'
    (tmp_path / "metrics.jsonl").write_text(line % 1 + line % 2 + line % 3 + '{"event": "tr')
    with RunFolder(tmp_path) as folder:
        folder.open_metrics(2)
        folder.event("train", 3, 3, {"loss": 1.0})
    assert [e["step"] for e in read_events(tmp_path)] == [1, 2, 3]
    assert read_events(tmp_path)[-1]["wall"] >= 1.5
