"""Real processes, joined by `jax.distributed` on this machine: the same run as in one."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaling.engine import adopt, build, config, encode
from scaling.engine.runfolder import read_events

ROOT = Path(__file__).parents[2]
Tiny = dict[str, str]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(start: Callable[..., Any], words: list[str], processes: int, devices: int) -> None:
    """The command in that many processes of so many devices each."""
    there = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    env = [{**there, "JAX_PROCESS_ID": str(i)} if processes > 1 else {} for i in range(processes)]
    running = [start(*words, devices=devices, env=e) for e in env]
    for process in running:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said


def test_two_processes_of_four_devices_are_one_process_of_one_device(
    tmp_path: Path, tiny: Tiny, start: Callable[..., Any]
) -> None:
    """Losses, evaluation and checkpoints: begun on 2 x 4 devices, resumed on one, against one throughout."""
    words = ["train", f"--config={tiny['vit']}", "--config.evaluate.val.batch_size=64"]
    run(start, [*words, f"--workdir={tmp_path / 'one'}"], processes=1, devices=1)
    two = [*words, f"--workdir={tmp_path / 'two'}"]
    run(start, [*two, "--config.train.duration=4 steps", "--config.mesh.fsdp=2"], processes=2, devices=4)
    assert {e["step"] for e in read_events(tmp_path / "two")} == {1, 2, 3, 4}
    run(start, two, processes=1, devices=1)
    expected, found = read_events(tmp_path / "one"), read_events(tmp_path / "two")
    assert [e["step"] for e in found] == [e["step"] for e in expected]
    for a, b in zip(found, expected, strict=True):
        assert a["values"] == pytest.approx(b["values"], rel=1e-4, abs=2e-3)


@pytest.mark.slow
def test_two_processes_encode_what_one_does(tmp_path: Path, start: Callable[..., Any]) -> None:
    cfg = config.load(str(ROOT / "tests/tiny_vae.py"))
    adopt.adopt(build.build(cfg), {"params": {}}, tmp_path / "vae", "no other")
    encode.encode(
        tmp_path / "vae", cfg, tmp_path / "one", 64
    )  # on eight devices, so that batches are as large
    words = [
        "encode",
        f"--run={tmp_path / 'vae'}",
        f"--config={ROOT / 'tests/tiny_vae.py'}",
        "--batch-size=32",
    ]
    run(start, [*words, f"--out={tmp_path / 'two'}"], processes=2, devices=4)
    assert len(list((tmp_path / "two").iterdir())) == 4 + 4 + 2
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
