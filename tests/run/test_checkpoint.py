"""Restoring: only a checkpoint that is proven damaged is moved; what else is wrong is an error."""

import errno
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from scaling.data.sources import arrays
from scaling.errors import UserError
from scaling.files import read_json
from scaling.run import build, state
from scaling.run.checkpoint import Checkpoints
from scaling.run.checkpoint_reading import LEFT_OUT
from scaling.run.folder import RunFolder, read_events
from scaling.run.restore import restore_run
from scaling.training import config, loop
from tests.support.run_folders import contents, names, status

Start = Callable[..., Any]
VIT = str(Path(__file__).parents[2] / "tests/support/tiny_vit.py")
EVERY_STEP = ["checkpoint.every=1 steps", "checkpoint.keep=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint of each of its eight steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    loop.train(config.load(VIT, EVERY_STEP), folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy with the checkpoints of steps 4 and 8."""
    shutil.copytree(trained, tmp_path / "run")
    for step in (1, 2, 3, 5, 6, 7):
        shutil.rmtree(tmp_path / "run/checkpoints" / str(step))
    return tmp_path / "run"


def like(*overrides: str) -> Any:
    """The state that a config asks for."""
    return state.abstract(build.build(config.load(VIT, list(overrides))))


def restored(run: Path, **options: Any) -> Any:
    with Checkpoints(run / "checkpoints", **options) as checkpoints:
        found = checkpoints.restore(like())
    assert found is not None
    return found


def arrays_of(checkpoint: Path) -> list[Path]:
    """The files that hold its arrays."""
    return [p for p in (checkpoint / "state").rglob("d/*") if p.is_file() and "process" in str(p)]


def damage(checkpoint: Path, how: str) -> None:
    for file in arrays_of(checkpoint):
        if how == "a truncated file":
            os.truncate(file, file.stat().st_size // 10)  # the second half may hold what was replaced
        elif how == "a deleted file":
            file.unlink()
        elif how == "a file of garbage":
            file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))
        elif how == "an emptied file":
            file.write_bytes(b"")
    if how == "a deleted list of arrays":
        (checkpoint / "state/_METADATA").unlink()
    elif how == "an emptied directory":
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    elif how == "a file in its place":
        shutil.rmtree(checkpoint)
        checkpoint.write_text("")


DAMAGES = {
    2: "a truncated file", 3: "a deleted file", 4: "a file of garbage", 5: "an emptied file",
    6: "a deleted list of arrays", 7: "an emptied directory", 8: "a file in its place",
}  # fmt: skip


# --- damage ---


def test_each_damaged_checkpoint_is_one_line_of_the_command(
    trained: Path, tmp_path: Path, start: Start
) -> None:
    """Seven kinds of damage, in a real process whose stderr is read whole; step 1 is what is left."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for step, how in DAMAGES.items():
        damage(run / "checkpoints" / str(step), how)
    overrides = [f"--config.{override}" for override in EVERY_STEP]
    process = start("train", f"--config={VIT}", f"--workdir={run}", *overrides)
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    own = [line for line in said.splitlines() if line.startswith("run: ")]
    others = [line for line in said.splitlines() if not line.startswith("run: ")]
    assert "run: resumed at step 1" in own
    assert len(others) == len(DAMAGES), said
    for line, step in zip(others, sorted(DAMAGES, reverse=True), strict=True):
        assert f"{run}/checkpoints/{step}: is damaged (" in line
        assert line.endswith(f"; moved to {run}/broken/{step}")
    assert names(run / "broken") == {str(step) for step in DAMAGES}


def test_the_one_before_is_restored_as_it_was(run: Path) -> None:
    shutil.move(run / "checkpoints/8", run / "8")
    fourth, _ = restored(run, read_only=True)
    shutil.move(run / "8", run / "checkpoints/8")
    damage(run / "checkpoints/8", "a deleted file")
    found, step = restored(run)
    assert step == 4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(fourth), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_reader_passes_damage_over_and_moves_nothing(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(run / "checkpoints/8", "a truncated file")
    before = contents(run)
    with caplog.at_level(logging.WARNING):
        assert restore_run(run).step == 4
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{run}/checkpoints/8: is damaged (") and said.endswith("; passed over")
    assert contents(run) == before


def test_an_earlier_broken_one_is_kept(run: Path) -> None:
    shutil.copytree(run / "checkpoints/4", run / "broken/8")
    damage(run / "checkpoints/8", "a deleted list of arrays")
    before = contents(run / "broken/8")
    assert restored(run)[1] == 4
    assert names(run / "broken") == {"8", "8.1"}
    assert contents(run / "broken/8") == before and "state/_METADATA" not in contents(run / "broken/8.1")


def test_what_orbax_did_not_finish_is_no_damage(run: Path) -> None:
    shutil.copytree(run / "checkpoints/8", run / "checkpoints/12.orbax-checkpoint-tmp")
    assert RunFolder(run).saved() == 8
    assert restored(run, read_only=True)[1] == restored(run)[1] == 8
    assert not (run / "broken").exists()


def test_a_whole_checkpoint_is_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    restore = ocp.PyTreeCheckpointHandler.restore

    def watched(*args: Any, **more: Any) -> Any:
        reads.append(args)
        return restore(*args, **more)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", watched)
    loop.train(config.load(VIT), run)
    assert len(reads) == 1


def test_who_wants_weights_reads_no_optimizer_state(run: Path) -> None:
    full = like()
    wanted = state.only_eval_weights(full)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        everything, part = checkpoints.restore(full), checkpoints.restore(wanted)
    assert everything is not None and part is not None and everything[1] == part[1]
    found = jax.tree.map(np.asarray, state.eval_weights(part[0]))
    jax.tree.map(np.testing.assert_array_equal, found, state.eval_weights(everything[0]))
    assert {id(x) for x in jax.tree.leaves(part[0].opt_state)} == {id(LEFT_OUT)}


# --- what does not fit ---


def with_classes(path: Path, count: int) -> None:
    """An npz file of so many classes."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    labels = np.arange(64) % count
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    arrays._npz.cache_clear()  # as in a process that starts anew


def test_a_class_more_in_the_data_is_an_error_and_nothing_is_touched(tmp_path: Path) -> None:
    run = tmp_path / "run"
    cfg = config.load(VIT, ["data.name=npz", f"data.data_dir={tmp_path / 'digits.npz'}"])
    with_classes(tmp_path / "digits.npz", 10)
    loop.train(cfg, run)
    before = contents(run)
    with_classes(tmp_path / "digits.npz", 11)
    for _ in range(2):
        with pytest.raises(UserError) as error:
            loop.train(cfg, run)
        assert str(error.value) == (
            f"data: npz has not the same labels or captions, as the run in {run} had it; put its data back, "
            "or choose another folder"
        )
        assert contents(run) == before
    with_classes(tmp_path / "digits.npz", 10)
    loop.train(cfg, run)
    assert contents(run)["metrics.jsonl"] == before["metrics.jsonl"]


def test_reading_a_run_whose_config_is_of_other_arrays(run: Path) -> None:
    described = read_json(run / "config.json")
    described["data"]["num_classes"] = 11
    (run / "config.json").write_text(json.dumps(described))
    before = contents(run)
    with pytest.raises(
        UserError, match=r"^\S+/8: params/head/bias is \[10\] there and \[11\] in this config"
    ):
        restore_run(run)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "optimizer.ema_decays=(0.9,)",
            r"ema/0\.9/\S+ is absent there and \[.*\] in this config \(24 of 98 arrays",
        ),
        ("optimizer.name=sgd", r"opt_state/\S+ is (absent|\[.*\]) there and (absent|\[.*\]) in this config"),
        ("model.depth=2", r"params/blocks/\S+ is \[1, .*\] there and \[2, .*\] in this config"),
    ],
)
def test_the_first_array_that_differs_is_named(run: Path, override: str, said: str) -> None:
    before, other = contents(run), like(override)
    with Checkpoints(run / "checkpoints") as checkpoints, pytest.raises(UserError, match=said) as error:
        checkpoints.restore(other)
    assert "\n" not in str(error.value)
    assert contents(run) == before


def test_an_array_too_many_and_one_of_another_type_are_named(run: Path) -> None:
    asked = like()
    half = jax.ShapeDtypeStruct((), np.dtype("int16"), sharding=asked.step.sharding)
    params = {name: tree for name, tree in asked.params.items() if name != "head"}
    cases = {
        "step is int32 there and int16 in this config": asked.replace(step=half),
        r"params/head/bias is \[10\] there and absent in this config": asked.replace(params=params),
    }
    with Checkpoints(run / "checkpoints") as checkpoints:
        for said, other in cases.items():
            with pytest.raises(UserError, match=said):
                checkpoints.restore(other)
    assert names(run / "checkpoints") == {"4", "8"}


# --- what this machine cannot read now ---


def of_an_array(cause: Exception) -> Exception:
    """As orbax raises it."""
    error = Exception("Encountered error while reading array index: (slice(0, 1, 1),).\nSee full details")
    error.__cause__ = cause
    return error


LACKS: dict[str, Exception] = {
    "memory of the host": MemoryError("Unable to allocate 4 GiB"),
    "memory of a device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
    "open files": OSError(errno.EMFILE, "Too many open files"),
    "open files, for an array": of_an_array(ValueError("RESOURCE_EXHAUSTED: Too many open files")),
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "a disk that answers": of_an_array(ValueError("UNKNOWN: Input/output error")),
    "a file, for a moment": FileNotFoundError(errno.ENOENT, "No such file or directory"),
}


def failing(error: Exception) -> Callable[..., Any]:
    """Restoring onto devices fails; the host can still read each array."""
    whole = ocp.PyTreeCheckpointHandler.restore

    def restore(self: Any, path: Any, *, args: Any) -> Any:
        if any(isinstance(leaf, ocp.ArrayRestoreArgs) for leaf in jax.tree.leaves(args.restore_args)):
            raise error
        return whole(self, path, args=args)

    return restore


@pytest.mark.parametrize("lack", LACKS)
def test_what_the_machine_lacks_moves_nothing(lack: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, before, error = config.load(VIT), contents(run), LACKS[lack]
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", failing(error))
    with pytest.raises(UserError) as caught:
        loop.train(cfg, run)
    assert str(caught.value).startswith(f"{run}/checkpoints/8: cannot be restored on this machine now (")
    assert str(error.__cause__ or error).splitlines()[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert status(run)["status"] == "failed" and status(run)["saved"] == 8
    assert contents(run) | {"status.json": b""} == before | {"status.json": b""}
    monkeypatch.undo()
    loop.train(cfg, run)
    assert status(run)["status"] == "done" and contents(run)["metrics.jsonl"] == before["metrics.jsonl"]


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder that every user may write in; a test may give up the rights of root."""
    root, folder = os.geteuid() == 0, Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


@pytest.mark.parametrize("kept_from", ["state/_METADATA", "state", "arrays", "."])
def test_without_permission_nothing_is_moved(kept_from: str, run: Path, anyones: Path) -> None:
    """A real one: the checkpoint is another user's, in a folder that it could be moved from."""
    asked, there = like(), anyones / "run"
    shutil.copytree(run, there)
    checkpoint = there / "checkpoints/8"
    kept = arrays_of(checkpoint) if kept_from == "arrays" else [checkpoint / kept_from]
    for path in (there, there / "checkpoints"):
        path.chmod(0o777)
    for path in kept:
        path.chmod(0)
    with Checkpoints(there / "checkpoints") as checkpoints:
        if os.geteuid() == 0:
            os.seteuid(65534)  # nobody
        with pytest.raises(UserError, match=r"/8: cannot be restored on this machine now \(.*[Pp]ermission"):
            checkpoints.restore(asked)
    assert names(there / "checkpoints") == {"4", "8"} and not (there / "broken").exists()
    if os.geteuid() == 65534:
        os.seteuid(0)
    for path in kept:
        path.chmod(0o755)
    assert restored(there)[1] == 8


def test_a_bug_keeps_its_traceback_and_moves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", failing(TypeError("unhashable")))
    with pytest.raises(TypeError, match="unhashable"):
        restore_run(run)
    with pytest.raises(TypeError, match="unhashable"):
        loop.train(config.load(VIT), run)
    assert names(run / "checkpoints") == {"4", "8"} and not (run / "broken").exists()


# --- several processes ---


@pytest.mark.slow
def test_processes_agree_on_what_is_damaged(tmp_path: Path, start: Start) -> None:
    """Two, of which the second alone reads the arrays that are damaged; both go on from the one before."""
    run = tmp_path / "run"
    words = ["train", f"--config={VIT}", f"--workdir={run}", "--config.mesh.fsdp=2"]
    words += ["--config.model.width=192", "--config.model.heads=2", "--config.evaluators.val.batch_size=64"]

    def both(*more: str) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        running = [start(*words, *more, env={**env, "JAX_PROCESS_ID": str(i)}) for i in range(2)]
        try:
            said = [process.communicate(timeout=120)[0] for process in running]
        finally:
            for process in running:
                process.kill()  # one that waits for another, if they did not agree
        assert all(process.returncode == 0 for process in running), said
        return said

    both("--config.train.duration=8 steps")
    seconds = [p for p in arrays_of(run / "checkpoints/8") if "process_1" in str(p)]
    assert seconds
    for file in seconds:
        file.write_bytes(b"")
    first, second = both("--config.train.duration=9 steps")
    assert "run: resumed at step 4" in first and first.count("is damaged") == 1 and "step" not in second
    assert "Traceback" not in first + second and "is damaged" not in second
    assert names(run / "broken") == {"8"}
    assert [e["step"] for e in read_events(run) if e["event"] == "train"] == list(range(1, 10))
