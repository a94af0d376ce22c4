"""Exported functions, called by a script that does not import this package."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.convert import stablehlo
from scaling.run import restore
from scaling.sampling import make_sampler
from scaling.training import config, loop

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, json, os, pathlib
import numpy as np
for path in map(pathlib.Path, sys.argv[1:]):
    os.chdir(path.parent)
    globals().update(np.load(path))
    for line in json.load(open("model.json"))["use"]: exec(line)
    np.save(path.with_suffix(".npy"), outputs)
assert not any(name.partition(".")[0] in ("scaling", "flax") for name in sys.modules)
"""
GUIDANCE = "sampling.guidance_scale=1.5"
INDICES, LABELS = np.arange(5, dtype=np.int32), np.array([3, 1, 4, 1, 5], np.int32)


def images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for family, more in (("vit", []), ("dit", [GUIDANCE])):
        source = str(ROOT / f"tests/support/tiny_{family}.py")
        loop.train(config.load(source, ["train.duration=2 steps", *more]), folder / family)
    return folder


@pytest.fixture(scope="module")
def functions(runs: Path) -> Path:
    """Folders of functions, each called in another process by its card's own lines."""
    folder = runs / "functions"
    stablehlo.export_function(runs / "vit", folder / "inside")
    stablehlo.export_function(runs / "vit", folder / "beside", inside=0)
    stablehlo.export_function(runs / "dit", folder / "dit")
    inputs: dict[str, dict[str, np.ndarray]] = {"dit/5": dict(indices=INDICES, labels=LABELS)}
    inputs |= {
        f"{name}/{batch}": dict(images=images(batch)) for name in ("inside", "beside") for batch in (1, 3)
    }
    paths = [folder / f"{call}.npz" for call in inputs]
    for path, arrays in zip(paths, inputs.values(), strict=True):
        np.savez(path, **arrays)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["inside", "beside"], ids=["weights inside", "weights beside"])
def test_a_classifier_for_any_batch_size(runs: Path, functions: Path, name: str) -> None:
    assert (functions / name / "weights.safetensors").exists() == (name == "beside")
    trained = restore.restore_run(runs / "vit")
    apply = jax.jit(trained.run.model.apply)
    for batch in (1, 3):
        expected = apply({"params": trained.weights["params"]}, jnp.asarray(images(batch)))
        found = np.load(functions / name / f"{batch}.npy")
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_generators_whole_guided_loop(runs: Path, functions: Path) -> None:
    trained = restore.restore_run(runs / "dit")
    run = trained.run
    assert run.config.sampling.guidance_scale == 1.5
    sampler = make_sampler(run.config.sampling, run.objective, run.image_shape)  # type: ignore[arg-type]
    expected = jax.jit(sampler)(trained.weights["params"], jnp.asarray(INDICES), jnp.asarray(LABELS))
    np.testing.assert_allclose(np.load(functions / "dit/5.npy"), expected, rtol=1e-3, atol=1e-4)


def test_the_card_says_what_it_is(functions: Path) -> None:
    card = json.loads((functions / "inside/model.json").read_text())
    assert card["arguments"] == {"images": "float32 [batch, 8, 8, 1]"}
    assert card["cost"]["params"] > 0 and card["cost"]["gmacs"] > 0
    assert 0 <= card["metrics"]["val_top1"] <= 1
    assert card["data"]["name"] == "digits" and card["config"]["model"]["name"] == "vit"
    assert "commit" in card and card["step"] == 2
