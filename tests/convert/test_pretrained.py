"""Families that are not trained here yet: their weights in, as a run without a loss, and out again."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from jax import export
from safetensors.numpy import load_file

from scaling import models
from scaling.cli import main
from scaling.convert import FORMATS, stablehlo, transfer
from scaling.errors import UserError
from scaling.evaluators.classifier_features import ClassifierFeatures
from scaling.run import restore
from scaling.training import config, loop
from tests.support import parity

CONFIG = str(Path(__file__).parents[2] / "configs/pretrained.py")
WIDE = {"width": 24, "depth": 2, "heads": 3}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("ViT-B/32", {**WIDE, "patch": 4, "resolution": 12, "embed_dim": 10, "text_width": 16,
                          "text_depth": 2, "text_heads": 2, "vocabulary": 30, "context": 9}),
    "vilt": ("B/32", {**WIDE, "patch": 4, "resolution": 12, "vocabulary": 30, "length": 7,
                      "tasks": ("mlm",)}),
    "t5": ("Small", {**WIDE, "head_width": 4, "mlp_width": 40, "vocabulary": 30}),
    "vivit": ("B/16x2", {**WIDE, "patch": 4, "resolution": 12, "frames": 4, "num_classes": 7}),
    "timesformer": ("B/16", {**WIDE, "patch": 4, "resolution": 12, "frames": 4, "num_classes": 7}),
}  # fmt: skip


def small(family: str) -> tuple[str, list[str]]:
    """The config, and its overrides."""
    variant, options = SMALL[family]
    return f"{CONFIG}:{family}/{variant}", [f"model.{name}={value!r}" for name, value in options.items()]


def outside(family: str, folder: Path) -> Path:
    """A folder as transformers saves it, with random weights."""
    variant, options = SMALL[family]
    model, inputs = models.make(family, variant, **options), models.inputs(family, variant, **options)
    described = FORMATS["huggingface"].families[family].config_file.config(model, inputs)
    cls = getattr(transformers, described["architectures"][0])
    reference = cls(cls.config_class(**described))
    parity.randomise(reference, 0.5)
    reference.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", SMALL)
def test_weights_in_and_out_again(family: str, tmp_path: Path) -> None:
    source, (cfg, overrides) = outside(family, tmp_path / "source"), small(family)
    given = ["import", "--format=huggingface", f"--config={cfg}", str(source), f"--out={tmp_path / 'run'}"]
    assert main([*given, *(f"--config.{o}" for o in overrides)]) == 0
    assert main(["export", "--format=huggingface", str(tmp_path / "run"), f"--out={tmp_path / 'back'}"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    architecture = json.loads((tmp_path / "back/config.json").read_text())["architectures"][0]
    opened = getattr(transformers, architecture)
    _, report = opened.from_pretrained(tmp_path / "back", output_loading_info=True, local_files_only=True)
    assert not any(report.values())


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, (cfg, overrides) = tmp_path_factory.mktemp("clip"), small("clip")
    transfer.import_run("huggingface", outside("clip", folder / "source"), config.load(cfg, overrides),
                        folder / "run")  # fmt: skip
    return folder / "run"


def test_a_run_without_a_loss_says_what_it_costs_and_cannot_be_trained(imported: Path) -> None:
    cost = json.loads((imported / "config.json").read_text())["cost"]
    run = restore.restore_run(imported).run
    assert cost["params"] == sum(
        x.size for x in jax.tree.leaves(restore.restore_run(imported).weights["params"])
    )
    assert cost["gmacs"] > 0 and cost["train_flops_per_step"] is None
    assert run.batch(5)["text"].shape == (5, 9)
    with pytest.raises(UserError, match=r"objective\.name='frozen': has no loss to train by"):
        loop.train(run.config, imported)
    with pytest.raises(UserError, match="is a run of frozen with clip, which has no features"):
        ClassifierFeatures(imported)


def test_another_resolution_resizes_the_positions_and_says_so(tmp_path: Path) -> None:
    source, (cfg, overrides) = outside("clip", tmp_path / "source"), small("clip")
    larger = config.load(cfg, [*overrides, "model.resolution=16"])
    said = transfer.import_run("huggingface", source, larger, tmp_path / "run")
    assert said[-1] == "image/positions: resized from 3x3 to 4x4 patches"
    image = restore.restore_run(tmp_path / "run").weights["params"]["image"]
    before = load_file(source / "model.safetensors")["vision_model.embeddings.position_embedding.weight"]
    assert image["positions"].shape == (17, 24)
    np.testing.assert_array_equal(image["positions"][0], before[0])  # the class token's
    np.testing.assert_allclose(np.mean(image["positions"][1:]), np.mean(before[1:]), atol=0.05)


def test_its_function_takes_any_batch(imported: Path, tmp_path: Path) -> None:
    stablehlo.export_function(imported, tmp_path / "function")
    function = export.deserialize(bytearray((tmp_path / "function/function.bin").read_bytes()))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 12, 12, 3)).astype(np.float32)
    text = rng.integers(0, 30, (3, 9)).astype(np.int32)
    out, trained = function.call(x, text), restore.restore_run(imported)
    expected = jax.jit(trained.run.model.apply)({"params": trained.weights["params"]}, x, text)
    for name in ("image", "text", "scale"):
        np.testing.assert_allclose(out[name], getattr(expected, name), rtol=1e-5, atol=1e-6)
