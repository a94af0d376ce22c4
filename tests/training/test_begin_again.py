"""No run begins at step 0 while its folder says that there was more."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaling.errors import UserError
from scaling.run import build
from scaling.run import folder as run_folder
from scaling.run.folder import RunFolder, read_events
from scaling.training import config, import_weights, loop
from tests.support.run_folders import contents, names, status

VIT = str(Path(__file__).parents[2] / "tests/support/tiny_vit.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    loop.train(config.load(VIT), folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, with the checkpoints of steps 4 and 8."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_when_all_are_damaged_no_start_begins_again(run: Path) -> None:
    cfg, before = config.load(VIT), contents(run)
    for step in ("4", "8"):
        (run / "checkpoints" / step / "state/_METADATA").unlink()
    for start in range(3):
        if start == 2:
            (run / "status.json").unlink()  # broken/ says it too
        with pytest.raises(UserError, match=r"no checkpoint there can be read, and step 8 was saved; put"):
            loop.train(cfg, run)
        assert names(run / "checkpoints") == set() and names(run / "broken") == {"4", "8"}
        assert contents(run)["metrics.jsonl"] == before["metrics.jsonl"]
        assert status(run)["status"] == "failed" and status(run)["saved"] == 8
    (run / "broken/8/state/_METADATA").write_bytes(before["checkpoints/8/state/_METADATA"])
    shutil.move(run / "broken/8", run / "checkpoints/8")  # as the error says
    loop.train(cfg, run)
    assert contents(run)["metrics.jsonl"] == before["metrics.jsonl"]


def lose_checkpoints(run: Path, older: bool) -> None:
    """Deletes them, of a run as it is now or as it was before `saved` was written."""
    shutil.rmtree(run / "checkpoints")
    said = status(run)
    if older:
        del said["saved"]
    (run / "status.json").write_text(json.dumps(said))


@pytest.mark.parametrize("older", [False, True])
def test_a_run_whose_checkpoints_were_deleted_does_not_begin_again(older: bool, run: Path) -> None:
    lose_checkpoints(run, older)
    before = contents(run)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"step 8 was saved; .* or delete {run} to begin again"):
            loop.train(config.load(VIT), run)
    assert contents(run)["metrics.jsonl"] == before["metrics.jsonl"]


@pytest.mark.parametrize("older", [False, True])
def test_imported_weights_that_were_deleted_are_not_replaced_by_random_ones(
    older: bool, tmp_path: Path
) -> None:
    cfg, run = config.load(VIT), tmp_path / "run"
    import_weights.create_run_from_weights(build.build(cfg), {"params": {}}, run, "no other")
    assert status(run)["saved"] == 0
    lose_checkpoints(run, older)
    for _ in range(2):
        with pytest.raises(UserError, match=r"step 0 was saved"):
            loop.train(cfg, run)
    assert not (run / "metrics.jsonl").exists() and names(run / "checkpoints") == set()


def test_status_that_cannot_be_read_is_no_leave_to_begin_again(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "status.json").write_text("{")
    before = contents(run)
    with pytest.raises(UserError, match=r"status\.json: is not JSON"):
        loop.train(config.load(VIT), run)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("said", "saved"),
    [
        ({}, None),
        ({"status": "running", "step": 3, "saved": None, "reason": None}, None),
        ({"status": "interrupted", "step": 3, "saved": None, "reason": "SIGTERM"}, None),
        ({"status": "failed", "step": 0, "saved": 0, "reason": "a reason"}, 0),
        ({"status": "running", "step": 3, "reason": None}, None),
        ({"status": "interrupted", "step": 0, "reason": "SIGTERM"}, None),
        ({"status": "interrupted", "step": 3, "reason": None}, None),
        ({"status": "interrupted", "step": 3, "reason": "SIGTERM"}, 3),
        ({"status": "done", "step": 0, "reason": "weights of another"}, 0),
    ],
)
def test_what_a_folder_without_checkpoints_says_was_saved(
    said: dict[str, Any], saved: int | None, tmp_path: Path
) -> None:
    (tmp_path / "status.json").write_text(json.dumps(said))
    with RunFolder(tmp_path) as folder:
        assert folder.saved() == saved
        folder.end("failed", "for a reason")
        assert folder.saved() == saved == status(tmp_path)["saved"]


@pytest.mark.parametrize("saved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_before_its_first_checkpoint_it_begins_again_and_not_after(
    saved: bool, tmp_path: Path, start: Callable[..., Any]
) -> None:
    options = [f"checkpoint.every={4 if saved else 1000} steps", "evaluators.val.every=1000 steps"]
    words = [f"--config.{option}" for option in (*options, "train.duration=1000 steps")]
    process = start("train", f"--config={VIT}", f"--workdir={tmp_path}", *words)
    deadline = time.monotonic() + 120

    def reached() -> bool:
        there = (tmp_path / "status.json").exists() and read_events(tmp_path)
        return bool(there) and (not saved or status(tmp_path)["saved"] is not None)

    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert status(tmp_path)["status"] == "running"
    shutil.rmtree(tmp_path / "checkpoints")
    cfg = config.load(VIT, [*options, "train.duration=2 steps"])
    if saved:
        with pytest.raises(UserError, match=r"no checkpoint there can be read, and step \d+ was saved"):
            loop.train(cfg, tmp_path)
    else:
        loop.train(cfg, tmp_path)
        assert [e["step"] for e in read_events(tmp_path) if e["event"] == "train"] == [1, 2]


def test_the_folder_says_what_is_saved_as_soon_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it trains, and without waiting for the next heartbeat."""
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 1e6)
    said: list[int | None] = []
    next_batch = loop._Loop._next

    def watched(self: Any, batches: Any) -> Any:
        said.append(status(tmp_path)["saved"])
        while len(said) == 5 and not (tmp_path / "checkpoints/4").is_dir():  # it is being written
            time.sleep(0.01)
        return next_batch(self, batches)

    monkeypatch.setattr(loop._Loop, "_next", watched)
    loop.train(config.load(VIT), tmp_path)
    assert said[:4] == [None] * 4 and said[5:] == [4] * 3
    assert status(tmp_path)["saved"] == 8
