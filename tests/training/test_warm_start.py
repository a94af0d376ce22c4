"""Beginning with another run's weights: at step 0 alone, where they belong, and refused in one line."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scaling.errors import UserError
from scaling.models import vivit
from scaling.overrides import flat
from scaling.run import build, restore, state
from scaling.run.options import Config
from scaling.training import config, loop, warm_start
from tests.support.run_folders import write_run

ROOT = Path(__file__).parents[2]
VIT, VIDEO = str(ROOT / "configs/mnist_vit.py:A/14"), str(ROOT / "configs/mnist_vivit.py:")
SMALL = ["data.batch_size=16", "train.duration=4 steps", "train.log_every=1", "checkpoint.every=2 steps"]
A = [*SMALL, "model.depth=1", "evaluators.val.every=4 steps", "data.video.frames=4", "data.video.stride=1"]
Read = Callable[[Path, Config], Any]


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "vit"
    overrides = ["data.batch_size=16", "model.depth=1", "model.pool=token", "optimizer.ema_decays=(0.5,)"]
    write_run(build.build(config.load(VIT, overrides)), folder)
    return folder


def video(model: str, image_run: Path | None, *overrides: str) -> Config:
    given = [] if image_run is None else [f"train.init_from={image_run}"]
    variant = "A/14" if model == "divided" else "A/14x2"
    return config.load(VIDEO + model, [*A, f"model.variant={variant}", *given, *overrides])


def as_numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("model", ["joint", "factorised-self-attention", "divided"])
def test_a_video_model_starts_from_an_image_model(model: str, image_run: Path) -> None:
    run = build.build(video(model, image_run, "optimizer.ema_decays=(0.9,)"))
    begun, _, said = warm_start.initial_state(run)
    source = restore.restore_run(image_run)
    family = importlib.import_module(f"scaling.models.{run.config.model.name}")
    fresh = as_numpy(state.init(run).params)
    expected = family.from_vit(run.model, fresh, source.run.model, as_numpy(source.weights["params"]))
    assert_same(as_numpy(begun.params), as_numpy(expected))
    assert (np.asarray(begun.params["head"]["kernel"]) == 0).all()  # the image's classes are not these
    assert_same(as_numpy(begun.ema["0.9"]["params"]), as_numpy(begun.params))
    assert said.startswith(f"starts from {image_run} at step 0; new are ") and "head" in said
    assert int(begun.step) == 0


def test_weights_live_where_the_mesh_has_them(image_run: Path) -> None:
    one = build.build(video("joint", image_run), jax.devices()[:1])
    cut = build.build(video("joint", image_run, "mesh.fsdp=4", "model.width=16"))
    alone, *_ = warm_start.initial_state(one)
    begun, *_ = warm_start.initial_state(cut)
    assert_same(as_numpy(begun.params), as_numpy(alone.params))
    assert jax.tree.map(lambda a: a.sharding, begun.params) == jax.tree.map(
        lambda a: a.sharding, state.abstract(cut).params
    )


def test_a_start_from_all_weights_is_a_fresh_one_with_them() -> None:
    """Nothing is initialised, and yet the optimiser, the averages and the places are the same."""
    overrides = ["data.batch_size=16", "model.depth=1", "model.pool=mean", "optimizer.ema_decays=(0.5,)"]
    run = build.build(config.load(VIT, [*overrides, "mesh.fsdp=2"]))
    weights = jax.tree.map(lambda s: np.full(s.shape, 2, s.dtype), state.abstract(run).params)
    started, expected = state.init_from(run, weights, {}), state.with_weights(state.init(run), weights, {})
    assert_same(as_numpy(started), as_numpy(expected))
    assert jax.tree.map(lambda a: a.sharding, started) == jax.tree.map(
        lambda a: a.sharding, state.abstract(run)
    )


@pytest.mark.slow
def test_stopped_and_resumed_is_unbroken_and_reads_the_start_no_more(
    image_run: Path, tmp_path: Path, read_state: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = video("joint", image_run)
    loop.train(cfg, tmp_path / "whole")
    save_and_evaluate = loop._Loop._save_and_evaluate

    def interrupt(trainer: Any, current: Any, step: int) -> None:
        save_and_evaluate(trainer, current, step)
        if step == 2:
            raise loop.Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_save_and_evaluate", interrupt)
        with pytest.raises(loop.Interrupted):
            loop.train(cfg, tmp_path / "broken")
    monkeypatch.setattr(loop, "initial_state", None)  # a resumed run needs no initial state
    loop.train(cfg, tmp_path / "broken")
    assert_same(read_state(tmp_path / "whole", cfg), read_state(tmp_path / "broken", cfg))
    described = flat(json.loads((tmp_path / "broken/config.json").read_text()))
    assert described["config.train.init_from"] == str(image_run)
    with pytest.raises(UserError, match=r"holds a run with train\.init_from="):
        loop.train(video("joint", None), tmp_path / "broken")


def test_the_same_family_goes_on_from_all_or_all_but_the_head(image_run: Path) -> None:
    overrides = ["data.batch_size=16", "model.depth=1", "model.pool=token", f"train.init_from={image_run}"]
    begun, _, said = warm_start.initial_state(build.build(config.load(VIT, overrides)))
    weights = as_numpy(restore.restore_run(image_run).weights["params"])
    assert_same(as_numpy(begun.params), weights)
    assert "new" not in said
    begun, _, said = warm_start.initial_state(
        build.build(config.load(VIT, [*overrides, "model.num_classes=12"]))
    )
    assert begun.params["head"]["kernel"].shape == (16, 12) and said.endswith("new are head")
    np.testing.assert_array_equal(begun.params["norm"]["scale"], weights["norm"]["scale"])


def test_only_what_a_pattern_finds_is_taken(image_run: Path) -> None:
    """The rest starts as it would without, even where its shapes differ."""
    own = ["data.batch_size=16", "model.depth=1", "model.pool=mean"]
    overrides = [*own, f"train.init_from={image_run}", "train.init_only=^blocks/"]
    begun, _, said = warm_start.initial_state(build.build(config.load(VIT, overrides)))
    fresh = as_numpy(state.init(build.build(config.load(VIT, own))).params)
    weights = as_numpy(restore.restore_run(image_run).weights["params"])
    assert_same(as_numpy(begun.params), {**fresh, "blocks": weights["blocks"]})
    assert said.endswith("new are head, norm, patch, positions")
    with pytest.raises(UserError, match=r"init_only='bloks': finds none of the parameters, such as"):
        warm_start.initial_state(build.build(config.load(VIT, [*overrides[:-1], "train.init_only=bloks"])))
    for wrong, reason in (("(", "is not a regular expression"), ("^blocks/", "must be '' without init_from")):
        with pytest.raises(UserError, match=rf"train\.init_only='.*': {reason}"):
            config.load(VIT, [f"train.init_only={wrong}"])


def test_position_tables_are_resized(tmp_path: Path) -> None:
    folder, cfg = tmp_path / "video", video("joint", None)
    write_run(build.build(cfg), folder)
    longer = build.build(video("joint", folder, "data.video.frames=8"))
    begun, *_ = warm_start.initial_state(longer)
    old = restore.restore_run(folder)
    resized, _ = vivit.resized({"params": old.weights["params"]}, old.run.model, longer.model)
    assert_same(as_numpy(begun.params), as_numpy(resized["params"]))


@pytest.mark.parametrize(
    ("config_of", "overrides", "said"),
    [
        (
            VIT,
            ["model.depth=1", "model.pool=token", "model.width=32"],
            r"arrays do not fit; .* is .* there, and",
        ),
        (
            VIT,
            ["model.depth=1", "model.pool=mean"],
            r"2 of \d+ arrays do not fit; positions is .* there",
        ),
        (
            VIDEO + "joint",
            [*A, "model.variant=F/14x2"],
            r"vit\.width=16: must be that of ViViT, which is 32",
        ),
        (str(ROOT / "tests/support/tiny_dit.py"), [], r"is a run of vit, which dit cannot start from"),
    ],
)
def test_what_does_not_fit_is_one_line(
    config_of: str, overrides: list[str], said: str, image_run: Path
) -> None:
    cfg = config.load(config_of, [*overrides, "data.batch_size=16", f"train.init_from={image_run}"])
    with pytest.raises(UserError, match=said) as error:
        warm_start.initial_state(build.build(cfg))
    assert "\n" not in str(error.value) and str(error.value).startswith("train.init_from=")


def test_no_such_run(tmp_path: Path) -> None:
    run = build.build(video("joint", tmp_path / "none"))
    with pytest.raises(UserError, match=r"train\.init_from='.*none': run=.*: no config\.json there"):
        warm_start.initial_state(run)


def test_a_video_model_does_not_start_from_another_video_family(tmp_path: Path) -> None:
    folder, cfg = tmp_path / "video", video("joint", None)
    write_run(build.build(cfg), folder)
    with pytest.raises(
        UserError,
        match=r"is a run of vivit, which timesformer cannot .* of timesformer or vit",
    ):
        warm_start.initial_state(build.build(video("divided", folder)))


def test_weights_that_were_imported_to_be_used_start_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "imported"
    overrides = ["model.depth=1", "model.num_classes=21"]
    run = build.build(config.load(str(ROOT / "configs/pretrained.py:vit/A/14"), overrides))
    write_run(run, folder)
    begun, _, said = warm_start.initial_state(build.build(video("joint", folder)))
    weights = restore.restore_run(folder).weights["params"]
    np.testing.assert_array_equal(begun.params["norm"]["scale"], weights["norm"]["scale"])
    assert "at step 0; new are head" in said


def test_weights_start_with_the_images_that_they_saw(image_run: Path) -> None:
    """Another normalisation is refused with what to give."""
    other = video("joint", image_run, "preprocessing.mean=(0.1,)")
    message = (
        r"weights saw images less \(0\.5,\), by \(0\.5,\); .* --config\.preprocessing\.mean=\"\(0\.5,\)\""
    )
    with pytest.raises(UserError, match=message):
        warm_start.initial_state(build.build(other))
