"""Frozen helpers: sharded with the run, read by its loss, never trained or saved, and known by a digest."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from scaling import objectives
from scaling.errors import UserError
from scaling.objectives.base import NO_HELPERS, Batch, Extras, Helpers, Loss, scaled, summarise
from scaling.plan.compile import PROGRAMS
from scaling.run import build, restore, state
from scaling.run.folder import read_events
from scaling.run.helpers import RunHelpers
from scaling.training import config, evaluate, import_weights, loop

WIDE = ["model.width=128", "model.heads=2"]  # large enough to be sharded


@dataclass(frozen=True)
class Distilled:
    """The squared error to another run's logits."""

    model: nn.Module

    def init(self, rng: jax.Array, batch: Batch, helpers: Helpers = NO_HELPERS) -> Any:
        assert helpers["teacher"].variables["params"].keys()
        return self.model.init(rng, jnp.zeros((1, *batch["image"].shape[1:])))

    def loss(self, params: Any, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        x = scaled(batch["image"])
        own, teachers = self.model.apply({"params": params}, x), extras.helpers["teacher"](x)
        return summarise({"loss": ((own - teachers) ** 2).mean(axis=1)}, batch, extras.collections)  # type: ignore[operator]


@pytest.fixture(autouse=True)
def distilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objectives.OBJECTIVES, "distilled", Distilled)


@pytest.fixture
def teacher(tmp_path: Path, tiny: dict[str, str]) -> Path:
    """An imported run: it was never trained here."""
    run = build.build(config.load(tiny["vit"], WIDE))
    params = jax.tree.map(lambda s: np.full(s.shape, 0.01, s.dtype), run.variable_shapes["params"])
    import_weights.create_run_from_weights(run, {"params": params}, tmp_path / "teacher", "a test")
    return tmp_path / "teacher"


def student(tiny: dict[str, str], teacher: Path, *overrides: str) -> Any:
    source = teacher.parent / "student.py"
    text = Path(tiny["vit"]).read_text().replace('name="classification"', 'name="distilled"')
    source.write_text(text)
    return config.load(str(source), [f"helpers.teacher={teacher}", "evaluators.val.every=100 %", *overrides])


def test_a_loss_reads_a_helper_that_is_sharded_and_never_saved(
    teacher: Path, tmp_path: Path, tiny: dict[str, str]
) -> None:
    cfg = student(tiny, teacher, "mesh.data=1", "mesh.fsdp=8", "train.duration=4 steps")
    last = loop.train(cfg, tmp_path / "run")
    described = json.loads((tmp_path / "run/config.json").read_text())["helpers"]["teacher"]
    digest = restore.weights_digest(restore.restore_run(teacher).weights["params"])
    assert described == {"run": str(teacher), "step": 0, "digest": digest}

    run = build.build(cfg)
    helper = RunHelpers(run, tmp_path / "run").load("teacher")
    kernel = helper.variables["params"]["blocks"]["mlp"]["up"]["kernel"]
    assert "fsdp" in kernel.sharding.spec and kernel.addressable_shards[0].data.size == kernel.size // 8
    stored = ocp.PyTreeCheckpointHandler().metadata((tmp_path / "run/checkpoints/4/state").resolve()).tree
    assert len(jax.tree.leaves(stored)) == len(jax.tree.leaves(state.abstract(run)))

    before = jax.tree.map(np.asarray, helper.variables)
    events = read_events(tmp_path / "run")
    assert events[0]["values"]["loss"] > last["val_loss"] > 0  # it learns what the teacher says
    assert evaluate.evaluate(tmp_path / "run") == pytest.approx(last, rel=1e-4)
    again = RunHelpers(run).load("teacher").variables
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, again), before)


def test_its_programs_take_the_helper_as_an_argument(teacher: Path, tiny: dict[str, str]) -> None:
    run = build.build(student(tiny, teacher), jax.devices()[:1])
    for name in ("train", "evaluate"):
        jitted, arguments = PROGRAMS[name](run, 16)
        assert run.helper_shapes["teacher"].module == build.described_run(teacher).model
        assert jitted.lower(*arguments).out_info is not None


def test_a_helper_whose_weights_changed_is_an_error(
    teacher: Path, tmp_path: Path, tiny: dict[str, str]
) -> None:
    loop.train(student(tiny, teacher, "train.duration=4 steps"), tmp_path / "run")
    shutil.rmtree(teacher)
    run = build.build(config.load(tiny["vit"], WIDE))
    import_weights.create_run_from_weights(run, {"params": {}}, teacher, "a test")
    message = (
        r"^helpers\.teacher='.*teacher': its weights have changed since this run began \(digest \w+, not"
    )
    with pytest.raises(UserError, match=message):
        loop.train(student(tiny, teacher), tmp_path / "run")
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(tmp_path / "run")


def test_a_helper_that_is_not_there_is_named(tmp_path: Path, tiny: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"^helpers\.teacher='.*nowhere': run=.*: no config\.json there"):
        build.build(student(tiny, tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"^helpers\.teacher=3: "):
        student(tiny, tmp_path / "nowhere", "helpers.teacher=3")
