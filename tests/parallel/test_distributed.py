"""Real processes, joined by `jax.distributed` on this machine: the same run as in one."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scaling.errors import UserError
from scaling.parallel.distributed import NAMES, join
from scaling.run import build
from scaling.run.folder import read_events
from scaling.training import config, encode, import_weights

ROOT = Path(__file__).parents[2]
Tiny = dict[str, str]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def as_slurm(count: int) -> list[dict[str, str]]:
    """What `srun` sets for each task of a step."""
    step = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    return [{**step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]


# Several verbs in one process, which is imported and joined once.
VERBS = "import json, sys; from scaling.cli import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"


def run(start: Callable[..., Any], *verbs: list[str], processes: int, devices: int) -> list[str]:
    """What each of so many processes said, each of so many devices and with its place for "MINE"."""
    there = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    running = []
    for i in range(processes):
        env = {**there, "JAX_PROCESS_ID": str(i)} if processes > 1 else {}
        words = json.dumps(verbs).replace("MINE", str(i))
        running.append(start(words, devices=devices, env=env, program=("-c", VERBS)))
    said = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running), said
    return said


WIDE = ["--config.model.width=192", "--config.model.heads=2"]  # wide enough for the rules to cut


def same_values(one: Path, other: Path) -> None:
    expected, found = read_events(one), read_events(other)
    assert [e["step"] for e in found] == [e["step"] for e in expected]
    for a, b in zip(found, expected, strict=True):
        assert a["values"] == pytest.approx(b["values"], rel=1e-4, abs=2e-3)


def test_two_processes_of_four_devices_are_one_process_of_one_device(
    tmp_path: Path, tiny: Tiny, start: Callable[..., Any]
) -> None:
    """Losses, evaluation and checkpoints: begun on 2 x 4 devices, resumed on one, against one throughout."""
    words = ["train", f"--config={tiny['vit']}", "--config.evaluators.val.batch_size=64", *WIDE]
    one, two = ([*words, f"--workdir={tmp_path / name}"] for name in ("one", "two"))
    half = [*two, "--config.train.duration=4 steps", "--config.mesh.fsdp=4"]
    said = run(start, half, ["evaluate", str(tmp_path / "two"), "--json"], processes=2, devices=4)
    assert "step 4/4" in said[0] and "step" not in said[1]  # who is first speaks, alone
    assert {e["step"] for e in read_events(tmp_path / "two")} == {1, 2, 3, 4}
    values = json.loads(said[0].splitlines()[-1])
    evaluated = {k: v for e in read_events(tmp_path / "two") for k, v in e["values"].items() if k in values}
    assert len(evaluated) > 1 and values == pytest.approx(evaluated, rel=1e-4) and "{" not in said[1]
    run(start, one, two, processes=1, devices=1)
    same_values(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_run_goes_on_over_other_processes_and_meshes(
    tmp_path: Path, tiny: Tiny, start: Callable[..., Any]
) -> None:
    """On 2 x 4 devices, 4 x 2, one process of 8, of 4, of 1; against one throughout."""
    words = ["train", f"--config={tiny['vit']}", "--config.evaluators.val.batch_size=64", *WIDE]
    words += ["--config.evaluators.val.every=1 steps"]
    run(start, [*words, f"--workdir={tmp_path / 'one'}"], processes=1, devices=1)
    stages = [(2, 4, "fsdp=8"), (4, 2, "fsdp=4 tensor=2"), (1, 8, "fsdp=2 tensor=2"), (1, 4, "fsdp=4")]
    stages.append((1, 1, ""))
    for i, (processes, devices, mesh) in enumerate(stages):
        flags = [f"--config.mesh.{part}" for part in mesh.split()]
        length = f"--config.train.duration={(2, 4, 6, 7, 8)[i]} steps"
        run(
            start,
            [*words, *flags, length, f"--workdir={tmp_path / 'many'}"],
            processes=processes,
            devices=devices,
        )
    same_values(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_ends_and_the_same_command_resumes(
    killed: int, tmp_path: Path, tiny: Tiny, start: Callable[..., Any]
) -> None:
    workdir = tmp_path / "run"
    words = ["train", f"--config={tiny['vit']}", "--config.train.duration=100000 steps", *WIDE]
    words += [
        "--config.evaluators.val.batch_size=64",
        "--config.checkpoint.every=20 steps",
        f"--workdir={workdir}",
    ]
    running = [start(*words, devices=2, env=env) for env in as_slurm(2)]  # found without a word
    deadline = time.monotonic() + 180
    while not (workdir / "checkpoints/20").is_dir():
        assert time.monotonic() < deadline and all(p.poll() is None for p in running)
        time.sleep(0.1)
    running[killed].kill()
    since = time.monotonic()
    said = running[1 - killed].communicate(timeout=60)[0]
    assert time.monotonic() - since < 60 and running[1 - killed].returncode != 0
    running[killed].communicate()
    assert "another task died" in said  # as jax has it; who speaks said at the start what to do
    assert killed == 0 or "after one is lost the others end, and the same command resumes" in said
    there = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    resumed = run(start, [*words, f"--config.train.duration={there + 2} steps"], processes=2, devices=2)
    assert "resumed at step" in resumed[0]


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tmp_path: Path, tiny: Tiny, start: Callable[..., Any]) -> None:
    """With the weights cut over both, which neither could have alone."""
    run_of, mesh = tmp_path / "run", ["--config.mesh.fsdp=8", "--config.mesh.data=1"]
    words = ["train", f"--config={tiny['dit']}", "--config.train.duration=4 steps", *WIDE, *mesh]
    run(start, [*words, f"--workdir={run_of}"], processes=2, devices=4)
    images = []
    for processes, devices in ((1, 8), (2, 4), (1, 3)):  # which do not divide the training's batch, too
        words = ["sample", str(run_of), f"--out={tmp_path}/{devices}.MINE.png"]
        words += [
            f"--npz={tmp_path}/{devices}.MINE.npz",
            "--samples=30",
            "--batch-size=24",
            "--guidance-scale=2",
        ]
        run(start, words, processes=processes, devices=devices)
        images.append(np.load(tmp_path / f"{devices}.0.npz")["images"].astype(int))
    assert (tmp_path / "4.0.png").stat().st_size > 500 and not list(tmp_path.glob("4.1.*"))
    assert images[0].shape == (30, 8, 8, 1) and np.ptp(images[0]) > 50
    for other in images[1:]:
        assert np.abs(images[0] - other).max() <= 1  # of 255: sums in another order


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ADDRESS": "here"}, r"^JAX_COORDINATOR_ADDRESS='here': must be HOST:PORT, "),
        ({"ADDRESS": "1234"}, r"^JAX_COORDINATOR_ADDRESS='1234': must be HOST:PORT, "),
        ({"ADDRESS": ":1234"}, r"^JAX_COORDINATOR_ADDRESS=':1234': must be HOST:PORT, "),
        ({"NUM": "2", "ID": "0"}, r"^JAX_COORDINATOR_ADDRESS='': must be HOST:PORT, "),
        ({"ADDRESS": "here:1"}, r"^JAX_NUM_PROCESSES='': must say how many"),
        ({"ADDRESS": "here:1", "NUM": "two"}, r"^JAX_NUM_PROCESSES='two': "),
        ({"ADDRESS": "here:1", "NUM": "2"}, r"^JAX_PROCESS_ID='': must say which"),
        ({"ADDRESS": "here:1", "NUM": "2", "ID": "2"}, r"^JAX_PROCESS_ID=2: must be less than"),
    ],
)
def test_processes_that_are_named_badly(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], said: str
) -> None:
    names = {"ADDRESS": "JAX_COORDINATOR_ADDRESS", "NUM": "JAX_NUM_PROCESSES", "ID": "JAX_PROCESS_ID"}
    for short, name in names.items():
        monkeypatch.delenv(name, raising=False)
        if short in given:
            monkeypatch.setenv(name, given[short])
    with pytest.raises(UserError, match=said):
        join()


def test_a_process_that_trains_several_runs_joins_once(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **named: joined.append(named))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(joined))
    for name, value in zip(NAMES, ("localhost:1234", "1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    join()
    join()
    assert len(joined) == 1


@pytest.mark.slow
def test_two_processes_encode_what_one_does(tmp_path: Path, start: Callable[..., Any]) -> None:
    cfg = config.load(str(ROOT / "tests/support/tiny_vae.py"))
    import_weights.create_run_from_weights(build.build(cfg), {"params": {}}, tmp_path / "vae", "no other")
    encode.encode(
        tmp_path / "vae", cfg, tmp_path / "one", 64
    )  # on eight devices, so that batches are as large
    words = [
        "encode",
        str(tmp_path / "vae"),
        f"--config={ROOT / 'tests/support/tiny_vae.py'}",
        "--batch-size=32",
    ]
    run(start, [*words, f"--out={tmp_path / 'two'}"], processes=2, devices=4)
    assert len(list((tmp_path / "two").iterdir())) == 4 + 4 + 2
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
