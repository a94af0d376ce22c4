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
import sys, json
import numpy as np
inputs = dict(np.load("inputs.npz"))
globals().update(inputs)
for line in json.load(open("model.json"))["use"]: exec(line)
assert not any(name.partition(".")[0] in ("scaling", "flax") for name in sys.modules)
np.save("outputs.npy", outputs)
"""


def called(folder: Path, **inputs: np.ndarray) -> np.ndarray:
    """The outputs of the folder's function, in another process, by the card's own lines."""
    np.savez(folder / "inputs.npz", **inputs)
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "outputs.npy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for family in ("vit", "dit"):
        overrides = ["train.duration=2 steps"]
        overrides += ["sampling.guidance_scale=1.5"] if family == "dit" else []
        loop.train(config.load(str(ROOT / f"tests/support/tiny_{family}.py"), overrides), folder / family)
    return folder


@pytest.mark.parametrize("beside", [False, True], ids=["weights inside", "weights beside"])
def test_a_classifier_for_any_batch_size(runs: Path, tmp_path: Path, beside: bool) -> None:
    out = tmp_path / "out"
    stablehlo.export_function(runs / "vit", out, inside=0 if beside else stablehlo.INSIDE)
    assert (out / "weights.safetensors").exists() == beside
    trained = restore.restore_run(runs / "vit")
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 8, 8, 1)).astype(np.float32)
        expected = trained.run.model.apply({"params": trained.weights["params"]}, jnp.asarray(x))
        np.testing.assert_allclose(called(out, images=x), expected, rtol=1e-4, atol=1e-5)


def test_a_generators_whole_guided_loop(runs: Path, tmp_path: Path) -> None:
    stablehlo.export_function(runs / "dit", tmp_path / "out")
    trained = restore.restore_run(runs / "dit")
    run = trained.run
    assert run.config.sampling.guidance_scale == 1.5
    indices, labels = np.arange(5, dtype=np.int32), np.array([3, 1, 4, 1, 5], np.int32)
    sampler = make_sampler(run.config.sampling, run.objective, run.image_shape)  # type: ignore[arg-type]
    expected = jax.jit(sampler)(trained.weights["params"], jnp.asarray(indices), jnp.asarray(labels))
    images = called(tmp_path / "out", indices=indices, labels=labels)
    np.testing.assert_allclose(images, expected, rtol=1e-3, atol=1e-4)


def test_the_card_says_what_it_is(runs: Path, tmp_path: Path) -> None:
    stablehlo.export_function(runs / "vit", tmp_path / "out")
    card = json.loads((tmp_path / "out/model.json").read_text())
    assert card["arguments"] == {"images": "float32 [batch, 8, 8, 1]"}
    assert card["cost"]["params"] > 0 and card["cost"]["gmacs"] > 0
    assert 0 <= card["metrics"]["val_top1"] <= 1
    assert card["data"]["name"] == "digits" and card["config"]["model"]["name"] == "vit"
    assert "commit" in card and card["step"] == 2
