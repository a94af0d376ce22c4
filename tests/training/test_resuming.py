"""What a run starts from and goes on with: other data, a cut-off import, or a ruined state is never taken."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scaling.data.sources import arrays
from scaling.errors import UserError
from scaling.files import write_json
from scaling.run import build, state
from scaling.run.folder import RunFolder, read_events
from scaling.training import config, import_weights, loop
from tests.support.run_folders import contents, names, status

ROOT = Path(__file__).parents[2]
DIT, VIT = (str(ROOT / f"tests/support/tiny_{name}.py") for name in ("dit", "vit"))


# --- a run that diverged ---


def test_the_advice_to_a_diverged_run_can_be_followed(tmp_path: Path, read_state: Any) -> None:
    """From the whole state: with the same config it goes on bit for bit, and a lower rate is taken."""
    cfg = config.load(VIT, ["checkpoint.every=4 steps"])
    loop.train(cfg, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/8")
    key = f"train.continue_from={tmp_path}/run/checkpoints/4"
    loop.train(config.load(VIT, [key]), tmp_path / "same")
    whole, same = (
        [e["values"] for e in read_events(tmp_path / name) if e["step"] > 4] for name in ("run", "same")
    )
    assert same == whole
    lower = config.load(VIT, [key, "optimizer.learning_rate=1e-9"])
    loop.train(lower, tmp_path / "lower")
    before, after = (read_state(tmp_path / name, cfg).params for name in ("run", "lower"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before, after)
    loop.train(lower, tmp_path / "lower")  # done: the same command changes nothing
    assert [e["step"] for e in read_events(tmp_path / "lower") if e["event"] == "train"] == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.continue_from={}/run"], "'.*': is at step 8, and this run ends at 8; make it longer"),
        (
            ["train.continue_from={}/run/checkpoints/7"],
            "'.*/7': checkpoint=7: .* has 4, 8; choose one of them",
        ),
        (["train.continue_from={}/nothing"], "'.*': .*no checkpoints there"),
        (["train.continue_from={}/run", "model.width=32"], "'.*': .* arrays differ"),
        (["train.continue_from={}/run", "train.init_from={}/run"], "'.*': must be None with init_from"),
    ],
)
def test_a_state_that_cannot_be_gone_on_from_is_refused(
    overrides: list[str], said: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^train.continue_from={said}"):
        loop.train(config.load(VIT, [override.format(trained.parent) for override in overrides]), tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    loop.train(config.load(VIT, ["checkpoint.every=4 steps"]), folder)
    return folder


def test_what_an_update_ruins_is_not_saved(tmp_path: Path) -> None:
    """Adam whose eps rounds to 0 divides 0 by 0 where a gradient is 0; the loss is finite until then."""
    with pytest.raises(
        UserError, match=r"^step 1: (params|ema)/\S+ is not finite \(\d+ arrays are not\)"
    ) as error:
        loop.train(config.load(DIT, ["optimizer.eps=1e-50", "checkpoint.every=1 steps"]), tmp_path)
    assert "no step is saved" in str(error.value) and "in the same folder" in str(error.value)
    assert not [name for name in names(tmp_path / "checkpoints") if name.isdecimal()]
    assert status(tmp_path)["status"] == "failed"


# --- other data ---


def digits(path: Path, seed: int, count: int = 64) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(count) % 10
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)


def on_npz(path: Path) -> Any:
    return config.load(VIT, ["data.name=npz", f"data.data_dir={path}", "evaluators.val.every=100 %"])


@pytest.mark.parametrize(
    ("seed", "count", "said"), [(1, 64, "not the same images"), (0, 96, "has 96 examples, not 64")]
)
def test_other_data_at_the_same_path_are_refused(seed: int, count: int, said: str, tmp_path: Path) -> None:
    digits(tmp_path / "a.npz", 0)
    cfg = on_npz(tmp_path / "a.npz")
    loop.train(cfg, tmp_path / "run")
    before = contents(tmp_path / "run/checkpoints")
    digits(tmp_path / "a.npz", seed, count)
    arrays._npz.cache_clear()
    with pytest.raises(UserError, match=f"^data: npz .*{said}.*; put its data back"):
        loop.train(cfg, tmp_path / "run")
    assert contents(tmp_path / "run/checkpoints") == before


def test_the_same_data_at_another_path_are_taken(tmp_path: Path) -> None:
    digits(tmp_path / "a.npz", 0)
    measured = loop.train(on_npz(tmp_path / "a.npz"), tmp_path / "run")
    shutil.move(tmp_path / "a.npz", tmp_path / "b.npz")
    assert loop.train(on_npz(tmp_path / "b.npz"), tmp_path / "run") == measured


# --- imports ---


def imported(out: Path) -> build.Run:
    run = build.build(config.load(VIT))
    fresh = state.init(run)
    import_weights.create_run_from_weights(run, {"params": fresh.params}, out, "elsewhere")
    return run


@pytest.mark.parametrize("moment", ["status", "checkpoint", "config"])
def test_a_cut_off_import_is_begun_again_and_never_trained_on(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*arguments: Any, **options: Any) -> None:
        raise SystemExit

    owner, name = {
        "status": (import_weights.shutil, "rmtree"),
        "checkpoint": (loop, "write_config"),
        "config": (RunFolder, "status"),
    }[moment]
    kept = getattr(owner, name)
    if moment == "config":  # its second status
        calls = iter([kept, cut])
        monkeypatch.setattr(owner, name, lambda *arguments: next(calls)(*arguments))
    else:
        monkeypatch.setattr(owner, name, cut)
    with pytest.raises(SystemExit):
        imported(tmp_path / "run")
    monkeypatch.undo()
    assert import_weights.was_cut_off(tmp_path / "run")
    with pytest.raises(UserError, match="its import was not finished; give the same `scaling import` again"):
        loop.train(config.load(VIT), tmp_path / "run")
    assert status(tmp_path / "run")["status"] == "importing"
    imported(tmp_path / "run")
    assert status(tmp_path / "run")["status"] == "done"
    assert not import_weights.was_cut_off(tmp_path / "run")


def test_a_folder_of_anything_else_is_no_import(tmp_path: Path) -> None:
    assert import_weights.was_cut_off(tmp_path)  # empty
    (tmp_path / "lock").touch()
    assert import_weights.was_cut_off(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert not import_weights.was_cut_off(tmp_path)
    write_json(tmp_path / "status.json", {"status": "done"})
    assert not import_weights.was_cut_off(tmp_path)
