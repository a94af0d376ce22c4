"""Launching a study: done runs are kept, broken ones resumed, failed ones told, Ctrl-C is passed on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from scaling import processes
from scaling.errors import UserError
from scaling.files import read_json
from scaling.study import launch
from scaling.study.jobs import Job
from tests.support.sweeps import BASE, CLASSIFIED, load_dict, starts

WRITE_REPORT = launch.write_report


def test_done_runs_are_kept_when_the_sweep_grows(study: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "w"
    assert launch.sweep(study([0, 1]), root) == 0
    assert launch.sweep(study([0, 1, 2]), root) == 0
    assert [len(starts(root, f"runs/seed={s}")) for s in (0, 1, 2)] == [1, 1, 1]


def test_commands_carry_overrides_workdir_and_cache(study: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "w"
    assert launch.sweep(study([1]), root, extra_overrides=["--config.train.duration=8 steps"]) == 0
    (start,) = starts(root, "runs/seed=1")
    assert start["pairs"] == {"train.duration": "8 steps", "train.seed": "1"}
    assert start["config"] == "c.py"
    assert start["cache"] == str(root / ".cache")
    assert "--config.train.seed=1" in (root / "runs/seed=1/log.txt").read_text()


def test_failed_runs_are_listed_and_others_go_on(
    study: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "w"
    monkeypatch.setattr(launch, "write_report", WRITE_REPORT)
    assert launch.sweep(study([13, 15, 0]), root) == 1
    out = capsys.readouterr().out
    assert "failed: seed=13: loss is NaN at step 2" in out
    assert "failed: seed=15: no such data (exit code 2" in out
    assert "2 failed" in out
    assert "scaling sweep" in out
    assert json.loads((root / "runs/seed=0/status.json").read_text())["status"] == "done"
    page = (root / "report.html").read_text()
    assert "seed=13 failed: loss is NaN at step 2" in page
    table = (root / "results.csv").read_text().splitlines()
    assert table[0] == (
        "run,step,train.seed,params,gmacs,tokens,train_flops,examples,hours,annealed,fd,status,steps,reason"
    )
    assert sum(line.startswith("seed=0,") for line in table) == 4


def test_killed_run_fails_and_is_resumed_by_the_same_command(
    study: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "w"
    assert launch.sweep(study([14]), root) == 1
    assert "ended by SIGKILL" in capsys.readouterr().out
    assert launch.sweep(study([14]), root) == 0
    assert [start["step"] for start in starts(root, "runs/seed=14")] == [0, 2]


def test_an_earlier_failure_is_not_passed_off(
    study: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose folder says why it failed once ends before it writes another status."""
    folder = tmp_path / "w/runs/seed=15"
    folder.mkdir(parents=True)
    earlier = {"status": "failed", "step": 1, "steps": 4, "reason": "loss is NaN", "heartbeat": 0.0}
    (folder / "status.json").write_text(json.dumps(earlier))
    assert launch.sweep(study([15]), tmp_path / "w") == 1
    out = capsys.readouterr().out
    assert "failed: seed=15: no such data (exit code 2" in out and "NaN" not in out


def test_workers_share_the_cores(
    study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one core cannot be split")
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    root = tmp_path / "w"
    assert launch.sweep(study([0, 1]), root, workers=2) == 0
    first, second = (starts(root, f"runs/seed={s}")[0] for s in (0, 1))
    ends = [json.loads((root / f"runs/seed={s}/status.json").read_text())["heartbeat"] for s in (0, 1)]
    assert not set(first["cores"]) & set(second["cores"])
    assert set(first["cores"]) | set(second["cores"]) == before
    assert max(first["time"], second["time"]) < min(ends)  # side by side
    assert os.sched_getaffinity(0) == before


def test_feature_classifiers_come_first_and_once(
    study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "load_config", lambda s, o: load_dict(s, o, CLASSIFIED))
    root = tmp_path / "w"
    assert launch.sweep(study([0, 1]), root) == 0
    assert launch.sweep(study([0, 1, 2]), root) == 0
    (classifier,) = starts(root, "features/fd")
    assert classifier["config"] == "configs/c.py"
    assert classifier["pairs"] == {}
    for seed in (0, 1, 2):
        (run,) = starts(root, f"runs/seed={seed}")
        assert run["pairs"]["evaluators.fd.classifier"] == str(root / "features/fd")
        assert run["time"] > classifier["time"]


def test_families_run_from_their_own_configs(
    study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family without the evaluator gets no classifier; those of other configs have folders of their own."""

    def load(source: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        fd = {"fd": {"classifier": "runs/c", "classifier_config": f"configs/of_{source}"}}
        base = {**BASE, "model": {"name": "", "variant": ""}, "evaluators": {} if source == "a.py" else fd}
        return load_dict(source, overrides, base)

    monkeypatch.setattr(launch, "load_config", load)
    file = study([], sweep="product({'model.name': ['a', 'b', 'c']})")
    text = file.read_text()
    file.write_text(text.replace("config='c.py'", "config={f: f'{f}.py' for f in 'abc'}"))
    root = tmp_path / "w"
    assert launch.sweep(file, root) == 0
    (a,), (b,), (c,) = (starts(root, f"runs/name={family}") for family in "abc")
    assert [run["config"] for run in (a, b, c)] == ["a.py", "b.py", "c.py"]
    assert a["pairs"].keys() == {"model.name"}
    folders = [run["pairs"]["evaluators.fd.classifier"] for run in (b, c)]
    assert folders == [str(root / "features/fd"), str(root / "features/fd_1")]
    assert starts(root, "features/fd_1")[0]["config"] == "configs/of_c.py"
    described = json.loads((root / "study.json").read_text())
    assert described["config"] == "a.py, b.py, c.py" and "b.py.train.seed" in described["base"]
    assert launch.sweep(file, root) == 0 and len(starts(root, "runs/name=a")) == 1
    file.write_text(text.replace("config='c.py'", "config={f: f'{f}2.py' for f in 'abc'}"))
    with pytest.raises(UserError, match=r"holds another study"):
        launch.sweep(file, root)


def test_a_given_classifier_is_used(
    study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "load_config", lambda s, o: load_dict(s, o, CLASSIFIED))
    root = tmp_path / "w"
    assert launch.sweep(study([0]), root, extra_overrides=["evaluators.fd.classifier=mine"]) == 0
    assert not (root / "features").exists()
    assert starts(root, "runs/seed=0")[0]["pairs"]["evaluators.fd.classifier"] == "mine"


def test_bad_overrides_stop_everything_before_it_starts(study: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "w"
    bad = study([], sweep="[{'train.seed': 0}, {'train.sead': 1}]")
    with pytest.raises(UserError, match=r"run sead=1: train\.sead: no such key"):
        launch.sweep(bad, root)
    with pytest.raises(UserError, match=r"--config\.train\.seed: is swept by study s"):
        launch.sweep(study([0]), root, extra_overrides=["train.seed=3"])
    with pytest.raises(UserError, match="workers=0"):
        launch.sweep(study([0]), root, workers=0)
    assert not root.exists()


@pytest.mark.parametrize(
    ("again", "extra", "message"),
    [
        ({"metric": "other_loss"}, [], "holds another study (metric='fd', not 'other_loss')"),
        ({}, ["train.duration=9 steps"], "holds another study (train.duration='4 steps', not '9 steps')"),
    ],
)
def test_another_study_is_refused(
    study: Callable[..., Path], tmp_path: Path, again: dict[str, str], extra: list[str], message: str
) -> None:
    root = tmp_path / "w"
    assert launch.sweep(study([0]), root) == 0
    before = (root / "study.json").read_bytes()
    with pytest.raises(UserError) as caught:
        launch.sweep(study([0], **again), root, extra_overrides=extra)
    assert message in str(caught.value)
    assert (root / "study.json").read_bytes() == before


def test_another_mesh_is_the_same_study(study: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "w"
    assert launch.sweep(study([0]), root) == 0
    assert launch.sweep(study([0, 1]), root, extra_overrides=["mesh.data=1"]) == 0


def test_a_run_of_other_overrides_is_not_passed_off(study: Callable[..., Path], tmp_path: Path) -> None:
    root = tmp_path / "w"
    assert launch.sweep(study([0]), root) == 0
    config = root / "runs/seed=0/config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 7'))
    with pytest.raises(UserError, match=r"was run with train\.seed=7, not 0"):
        launch.sweep(study([0]), root)


OLDER: dict[str, Any] = {
    "model": {"family": "vit", "variant": "F/7"},
    "train": {"seed": 0, "start": None, "betas": [0.9, 0.99]},
}
CURRENT: dict[str, Any] = {
    "model": {"name": "vit", "variant": "F/7"},
    "train": {"seed": 0, "init_from": None, "betas": (0.9, 0.99)},
    "evaluators": {},
}


@pytest.mark.parametrize("several", [False, True])
def test_an_older_study_is_read_in_todays_words(
    study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """Its base and its runs have the keys' former names, and lists where Python has tuples."""

    def load(source: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        config = load_dict(source, overrides, CURRENT)
        return {**config, "train": {**config["train"], "betas": (0.9, 0.99)}}

    monkeypatch.setattr(launch, "load_config", load)
    file, root = study([], sweep="product({'model.name': ['vit', 'swin']})"), tmp_path / "w"
    if several:
        text = file.read_text().replace("config='c.py'", "config={'vit': 'c.py', 'swin': 'd.py'}")
        file.write_text(text)
    assert launch.sweep(file, root) == 0
    run, described = root / "runs/name=vit/config.json", read_json(root / "study.json")
    base = {f"{section}.{key}": value for section, keys in OLDER.items() for key, value in keys.items()}
    sources = ("c.py.", "d.py.") if several else ("",)
    described["base"] = {f"{source}{key}": value for source in sources for key, value in base.items()}
    described["runs"] = {f"family={name}": {"model.family": name} for name in ("vit", "swin")}
    for name in ("vit", "swin"):
        (root / f"runs/name={name}").rename(root / f"runs/family={name}")
    run = root / "runs/family=vit/config.json"
    (root / "study.json").write_text(json.dumps(described))
    run.write_text(json.dumps({"config": OLDER}))
    assert launch.sweep(file, root) == 0
    assert len(starts(root, "runs/family=vit")) == 1  # kept
    assert sorted(path.name for path in (root / "runs").iterdir()) == ["family=swin", "family=vit"]
    now = json.loads((root / "study.json").read_text())["runs"]
    assert now == {"family=vit": {"model.name": "vit"}, "family=swin": {"model.name": "swin"}}
    run.write_text(json.dumps({"config": {**OLDER, "model": {"family": "dit"}}}))
    with pytest.raises(UserError, match=r"was run with model\.name='dit', not 'vit'"):
        launch.sweep(file, root)


def test_unwritable_folder(study: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        launch.sweep(study([0]), tmp_path / "file" / "w")


# --- a sweep in a process of its own -------------------------------------------------------------

DRIVER = """
import sys
from tests.support.sweeps import WORKER, load_dict
from scaling.study import launch
from scaling.study.launchers import local
local.WORKER, launch.load_config, launch.write_report = WORKER, load_dict, print
launch.check_evaluators = lambda source, flags: ("fd",)
sys.exit(launch.sweep({study!r}, {root!r}, workers={workers}))
"""


def start(study: Path, root: Path, seconds: str, workers: int = 1) -> subprocess.Popen[str]:
    code = DRIVER.format(study=str(study), root=str(root), workers=workers)
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "FAKE_SECONDS": seconds, "FAKE_STEPS": "6"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(folder: Path, step: int) -> None:
    for _ in range(600):
        with contextlib.suppress(FileNotFoundError):
            if json.loads((folder / "status.json").read_text())["step"] >= step:
                return
        time.sleep(0.05)
    raise AssertionError(f"{folder} did not reach step {step}")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on_and_the_same_command_resumes(
    study: Callable[..., Path], tmp_path: Path, signum: signal.Signals
) -> None:
    root, file = tmp_path / "w", study([0, 1, 2])
    process = start(file, root, "0.3", workers=2)
    for seed in (0, 1):
        wait_for(root / f"runs/seed={seed}", 1)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert f"stopped by {signum.name}; resume with: scaling sweep {file} --workdir {root} --workers 2" in out
    for seed in (0, 1):
        heard = "SIGTERM" if signum == signal.SIGHUP else signum.name  # under nohup a run hears no SIGHUP
        assert (root / f"runs/seed={seed}/signal.txt").read_text() == heard
        assert json.loads((root / f"runs/seed={seed}/status.json").read_text())["status"] == "interrupted"
    assert not (root / "runs/seed=2").exists()

    reached = json.loads((root / "runs/seed=0/status.json").read_text())["step"]
    assert launch.sweep(file, root) == 0
    assert starts(root, "runs/seed=0")[1]["step"] == reached > 0


def test_after_a_killed_sweep_its_runs_are_waited_for_and_kept(
    study: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file = tmp_path / "w", study([0, 1])
    process = start(file, root, "0.5")
    wait_for(root / "runs/seed=0", 1)
    with pytest.raises(UserError, match=rf"another sweep \(process {process.pid}\) writes here"):
        launch.sweep(file, root)
    process.kill()  # leaves its run behind, still training
    process.communicate()
    assert launch.sweep(file, root) == 0
    assert "an earlier sweep's process" in capsys.readouterr().out
    assert len(starts(root, "runs/seed=0")) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_waits_for_another_hosts_run_ends_at_once(
    study: Callable[..., Path], tmp_path: Path, signum: signal.Signals
) -> None:
    """Its heartbeat may be stale for a minute, and it hears no signal from here."""
    root, file = tmp_path / "w", study([0])
    (root / "runs/seed=0").mkdir(parents=True)
    elsewhere = {"status": "running", "step": 1, "steps": 4, "host": "elsewhere", "pid": 1}
    (root / "runs/seed=0/status.json").write_text(json.dumps({**elsewhere, "heartbeat": time.time()}))
    process = start(file, root, "0.1")
    assert process.stdout is not None and "is still training it; waiting" in process.stdout.readline()
    process.send_signal(signum)
    assert process.wait(timeout=20) == 128 + signum  # the heartbeat is young for 60 s
    process.communicate()


@pytest.mark.parametrize(("started", "trains"), [(0, True), (1, False)])
def test_a_process_is_known_by_its_number_and_its_start(tmp_path: Path, started: int, trains: bool) -> None:
    status = {"status": "running", "heartbeat": time.time(), "host": os.uname().nodename, "pid": os.getpid()}
    ticks = processes.start_time(os.getpid())
    assert ticks is not None
    (tmp_path / "status.json").write_text(json.dumps({**status, "pid_started": ticks + started}))
    assert Job("run", tmp_path, "c.py", []).trained_by() == (os.getpid() if trains else None)


def test_an_evaluator_that_refuses_says_so_once_and_before_its_classifier_is_trained(
    tmp_path: Path, tiny: dict[str, str]
) -> None:
    fd = f'dict(name="frechet", classifier="c", classifier_config={tiny["vit"]!r}, samples=10)'
    config = Path(tiny["dit"]).read_text().replace("checkpoint=", f"evaluators=dict(fd={fd}),\n checkpoint=")
    (tmp_path / "config.py").write_text(config)
    (tmp_path / "study.py").write_text(
        "from scaling.study.sweep import Study, product\n"
        f"STUDY = Study(name='s', config={str(tmp_path / 'config.py')!r}, "
        "sweep=product({'train.seed': [0, 1, 2]}), metric='fd_digits')\n"
    )
    with pytest.raises(UserError, match=r"^study s, run seed=0: evaluators\.fd\.samples=10: .* at least 160"):
        launch.sweep(tmp_path, tmp_path / "w")
    assert not (tmp_path / "w").exists()
