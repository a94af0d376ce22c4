"""A denoiser conditioned on masked tokens: it trains, is guided, sampled, evaluated, planned and exported.

Its model, its config and this test are all that there is of it (tests/support/captioned.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from scaling import models
from scaling.convert import stablehlo
from scaling.data import open_source
from scaling.errors import UserError
from scaling.evaluators.generate import make_generator
from scaling.plan.compile import PROGRAMS
from scaling.run import build, restore
from scaling.run.folder import read_events
from scaling.sampling import Sampling
from scaling.training import config, evaluate, loop
from tests.support import captioned

TINY = str(Path(__file__).parents[1] / "support/tiny_captioned.py")


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "captioned", captioned.FAMILY)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, registered: None) -> Path:
    folder = tmp_path_factory.mktemp("captioned") / "run"
    loop.train(config.load(TINY), folder)
    return folder


def test_it_trains_is_evaluated_and_draws_a_grid(folder: Path) -> None:
    events = read_events(folder)
    assert events[-1]["values"].keys() == {"val_loss", "val_mse"}
    assert [path.name for path in (folder / "samples").iterdir()] == ["step_00000004.png"]
    assert evaluate.evaluate(folder) == pytest.approx(events[-1]["values"], rel=1e-5)


def test_samples_take_the_captions_of_the_split_in_order(folder: Path, tmp_path: Path) -> None:
    evaluate.sample(folder, tmp_path / "grid.png", tmp_path / "samples.npz", 504, 56, {})
    source: Any = open_source(config.load(TINY).data, "test")
    tokens = source.read(np.arange(500))
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["images"].shape == (504, 8, 8, 3)
        np.testing.assert_array_equal(arrays["tokens"][:500], tokens["text"])
        np.testing.assert_array_equal(arrays["mask"][500:], tokens["text_mask"][:4])  # from the first again


def test_it_is_guided_away_from_no_caption(folder: Path) -> None:
    trained = restore.restore_run(folder)
    run, params = trained.run, trained.weights["params"]

    def first_of(scale: float) -> Any:
        options = Sampling("euler", steps=1, guidance_scale=scale, condition_split="test")
        return next(make_generator(run, options, 8, {})(trained.weights, 8))

    plain, guided = first_of(1.0), first_of(3.0)
    key = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(8))
    noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 2**31 - 1), (8, 8, 3)))(key)
    null = jax.tree.map(jnp.zeros_like, plain.condition)
    cond, uncond = (
        run.model.apply({"params": params}, noise, jnp.full(8, 0.001), condition)
        for condition in (plain.condition, null)
    )
    assert float(jnp.abs(cond - uncond).max()) > 0.1  # type: ignore[operator]
    for found, velocity in ((plain, cond), (guided, uncond + 3 * (cond - uncond))):  # type: ignore[operator]
        expected = np.clip(127.5 * np.asarray(noise + velocity) + 128, 0, 255)
        np.testing.assert_allclose(np.asarray(found.images, np.float32), expected, atol=2)


def test_its_programs_compile_ahead_of_time(folder: Path) -> None:
    run = build.build(config.load(TINY), jax.devices()[:1])
    for program in PROGRAMS.values():
        jitted, arguments = program(run, 16)
        assert jitted.lower(*arguments).out_info is not None


def test_it_is_exported_with_its_condition(folder: Path, tmp_path: Path) -> None:
    stablehlo.export_function(folder, tmp_path / "out")
    card = json.loads((tmp_path / "out/model.json").read_text())
    assert card["arguments"] == {
        "indices": "int32 [batch]",
        "condition": {"mask": "bool [batch, 12]", "tokens": "int32 [batch, 12]"},
    }
    trained = restore.restore_run(folder)
    generate = make_generator(trained.run, trained.run.config.sampling, 8, {})
    generated = next(generate(trained.weights, 8))
    function = export.deserialize(bytearray((tmp_path / "out/function.bin").read_bytes()))
    condition = jax.tree.map(np.asarray, generated.condition)
    images = np.asarray(function.call(np.arange(8, dtype=np.int32), condition))
    expected = np.asarray(generated.images, np.float32)
    np.testing.assert_allclose(np.clip(127.5 * images + 128, 0, 255), expected, atol=1.01)


def test_without_a_split_there_is_nothing_to_be_conditioned_on(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^sampling\.condition_split='': captioned is conditioned on more"):
        evaluate.sample(folder, tmp_path / "grid.png", None, 8, 8, {"condition_split": ""})
    with pytest.raises(UserError, match=r"^sampling\.condition_split='tset': "):
        evaluate.sample(folder, tmp_path / "grid.png", None, 8, 8, {"condition_split": "tset"})
