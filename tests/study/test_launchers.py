"""Launchers: a sweep does not know where its jobs run, and the workers of this machine stay warm."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from scaling.errors import UserError
from scaling.run.folder import read_events
from scaling.study import launch
from scaling.study.jobs import Job
from scaling.study.launchers import LAUNCHERS, Launcher
from scaling.study.launchers.local import Local
from tests.support.run_folders import status
from tests.support.sweeps import starts

# --- a launcher of another kind ------------------------------------------------------------------


class Task(threading.Thread):
    """A job of the cluster: it waits in the queue, then writes a run folder as training does."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.stopped, self.seed = job, threading.Event(), int(job.name.removeprefix("seed="))

    def run(self) -> None:
        if self.stopped.wait(0.3):
            return  # it was in the queue
        self.job.folder.mkdir(parents=True)
        for step in range(5):
            self.write("running", step)
            if self.seed == 13 and step == 2:
                return  # its node is lost
            if self.stopped.wait(0.05):
                self.write("interrupted", step)
                return
        self.write(*("failed", 4, "loss is NaN") if self.seed == 7 else ("done", 4))

    def write(self, state: str, step: int, reason: str | None = None) -> None:
        value = {"status": state, "step": step, "steps": 4, "reason": reason, "host": "node", "pid": 1}
        (self.job.folder / ".status").write_text(json.dumps({**value, "heartbeat": time.time()}))
        (self.job.folder / ".status").replace(self.job.folder / "status.json")


class Cluster:
    """A launcher whose handles are numbers in a queue."""

    def __init__(self, env: Mapping[str, str], jobs_at_a_time: int) -> None:
        self.tasks: list[Task] = []
        self.signals: list[int] = []
        self.at_a_time, self.queued, self.closed = 0, False, False

    def submit(self, job: Job) -> int:
        self.tasks.append(Task(job))
        self.tasks[-1].start()
        self.at_a_time = max(self.at_a_time, sum(task.is_alive() for task in self.tasks))
        return len(self.tasks) - 1

    def alive(self, handle: int) -> bool:
        self.queued |= self.tasks[handle].is_alive() and not self.tasks[handle].job.folder.exists()
        return self.tasks[handle].is_alive()

    def stop(self, handle: int, signum: int) -> None:
        self.signals.append(signum)
        self.tasks[handle].stopped.set()

    def reason(self, handle: int) -> str:
        return f"job {handle} is lost"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    clusters: list[Cluster] = []

    def start(env: Mapping[str, str], jobs_at_a_time: int) -> Launcher:
        clusters.append(Cluster(env, jobs_at_a_time))
        return clusters[-1]

    monkeypatch.setitem(LAUNCHERS, "cluster", start)
    return clusters


def test_a_sweep_runs_on_any_launcher(
    study: Callable[..., Path], tmp_path: Path, cluster: list[Cluster], capsys: pytest.CaptureFixture[str]
) -> None:
    root, file = tmp_path / "w", study([0, 13, 7, 1])
    assert launch.sweep(file, root, workers=2, launcher="cluster") == 1
    out = capsys.readouterr().out
    assert "failed: seed=13: job 1 is lost\n" in out
    assert "failed: seed=7: loss is NaN\n" in out and "2 failed" in out
    assert [status(root / f"runs/seed={seed}")["status"] for seed in (0, 1)] == ["done", "done"]
    (used,) = cluster
    assert used.queued and used.closed and used.at_a_time == 2 and len(used.tasks) == 4
    with pytest.raises(UserError, match=r"^launcher='slurm': must be one of local, cluster$"):
        launch.sweep(file, root, launcher="slurm")


def test_signals_reach_jobs_that_run_and_jobs_that_wait(
    study: Callable[..., Path], tmp_path: Path, cluster: list[Cluster], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "w"

    def stop_the_second() -> None:  # the first run is done, the second waits, the third was never submitted
        while len(cluster[0].tasks if cluster else []) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    thread = threading.Thread(target=stop_the_second)
    thread.start()
    assert launch.sweep(study([0, 1, 2]), root, launcher="cluster") == 128 + signal.SIGHUP
    thread.join()
    out = capsys.readouterr().out
    assert "stopped by SIGHUP; resume with: scaling sweep" in out and "failed" not in out
    assert cluster[0].signals == [signal.SIGTERM]  # which runs listen to
    assert [path.name for path in (root / "runs").iterdir()] == ["seed=0"]
    assert status(root / "runs/seed=0")["status"] == "done" and len(cluster[0].tasks) == 2


# --- the workers of this machine -----------------------------------------------------------------


def test_a_worker_takes_one_run_after_the_other_until_one_ends_badly(
    study: Callable[..., Path], tmp_path: Path
) -> None:
    """13 fails, 14 is killed, 15 ends before it has a status: only their own runs fail."""
    root = tmp_path / "w"
    seeds = [0, 1, 13, 2, 14, 3, 15, 4, 5]
    assert launch.sweep(study(seeds), root) == 1
    states = {seed: (root / f"runs/seed={seed}/status.json").exists() for seed in seeds}
    assert [seed for seed in seeds if not states[seed]] == [15]
    done = [seed for seed in seeds if states[seed] and status(root / f"runs/seed={seed}")["status"] == "done"]
    assert done == [0, 1, 2, 3, 4, 5]
    pids = [starts(root, f"runs/seed={seed}")[0]["pid"] for seed in (0, 1, 13, 2, 14, 3, 4, 5)]
    assert [pids.index(pid) for pid in pids] == [0, 0, 0, 3, 3, 5, 6, 6]
    for seed in seeds:  # each log has its own command and nothing of another run
        log = (root / f"runs/seed={seed}/log.txt").read_text()
        assert log.count("$ ") == 1 and f"--config.train.seed={seed} " in log
        assert ("no such data" in log) == (seed == 15)


def fake_job(root: Path, name: str) -> Job:
    return Job(name, root / name, "c.py", ["--config.train.seed=0"])


def finish(launcher: Local, handle: Any) -> None:
    deadline = time.monotonic() + 60
    while launcher.alive(handle):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_dies_while_it_waits_takes_no_job_with_it(
    study: Callable[..., Path], tmp_path: Path
) -> None:
    launcher = Local(os.environ, 1)
    pids = []
    for name in ("a", "b"):
        job = fake_job(tmp_path, name)
        finish(launcher, launcher.submit(job))
        assert job.done()
        pids.append(starts(tmp_path, name)[0]["pid"])
        os.kill(pids[-1], signal.SIGKILL)
        os.waitid(os.P_PID, pids[-1], os.WEXITED | os.WNOWAIT)
    assert len(set(pids)) == 2
    launcher.close()


def test_workers_end_with_their_launcher(study: Callable[..., Path], tmp_path: Path) -> None:
    launcher = Local(os.environ, 2)
    handles = [launcher.submit(fake_job(tmp_path, name)) for name in ("a", "b")]
    for handle in handles:
        finish(launcher, handle)
    launcher.close()
    for name in ("a", "b"):
        with pytest.raises(ProcessLookupError):
            os.kill(starts(tmp_path, name)[0]["pid"], 0)


def test_a_log_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a/log.txt").mkdir(parents=True)
    launcher = Local(os.environ, 1)
    handle = launcher.submit(fake_job(tmp_path, "a"))
    assert not launcher.alive(handle)
    assert launcher.reason(handle).startswith(f"cannot be started in {tmp_path}/a (Is a directory); ")
    launcher.close()


def test_the_share_of_training_is_printed(
    study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("FAKE_SECONDS", "0.5")  # a step, of which there are four
    root = tmp_path / "w"
    assert launch.sweep(study([0]), root) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "in training steps" in text]
    assert line.startswith("s: 2 s in training steps are ") and "(workers x wall time)" in line
    assert 20 < int(line.split("%")[0].split()[-1]) <= 100
    assert launch.sweep(study([0]), root) == 0
    assert "in training steps" not in capsys.readouterr().out  # nothing was trained


# --- with real runs ------------------------------------------------------------------------------

CONFIG = """
from tests.support import tiny_dit

def get_config(variant="A/4"):
    config = tiny_dit.get_config(variant)
    config.evaluators = dict(
        val=dict(name="metrics", every="6 steps", batch_size=128),
        grid=dict(name="grid", every="100 %", batch_size=16, sampling=config.sampling.to_dict()),
    )
    return config
"""


def test_a_warm_workers_run_has_the_bits_of_a_fresh_processs(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two runs that share what is compiled, and differ in every traced value."""
    monkeypatch.setattr(launch, "write_report", lambda root: None)
    (tmp_path / "c.py").write_text(CONFIG)
    second = {
        "train.seed": 3, "optimizer.learning_rate": 3e-3, "optimizer.weight_decay": 0.1,
        "objective.condition_dropout": 0.4,
    }  # fmt: skip
    first = dict.fromkeys(second, 0.1) | {"train.seed": 0}
    (tmp_path / "study.py").write_text(
        "from scaling.study.sweep import Study\n"
        f"STUDY = Study('s', {str(tmp_path / 'c.py')!r}, sweep={[first, second]!r}, metric='val_loss')\n"
    )
    flags = [f"--config.{key}={value}" for key, value in second.items()]
    fresh = start("train", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'f'}", *flags, devices=8)
    assert launch.sweep(tmp_path / "study.py", tmp_path / "w") == 0
    said = fresh.communicate(timeout=180)[0]
    assert fresh.returncode == 0, said
    one, two = sorted((tmp_path / "w/runs").iterdir(), key=lambda run: "seed=3" in run.name)
    assert status(one)["pid"] == status(two)["pid"] != status(tmp_path / "f")["pid"]
    events = [
        [(e["event"], e["step"], e["values"]) for e in read_events(run)] for run in (one, two, tmp_path / "f")
    ]
    assert events[1] == events[2] != events[0] and len(events[0]) == len(events[1]) > 12
    grids = [(run / "samples").glob("*.png") for run in (two, tmp_path / "f")]
    assert [path.read_bytes() for path in grids[0]] == [path.read_bytes() for path in grids[1]] != []
