"""DiT as diffusers computes it: its folders in and out exactly; the authors' converted weights told apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.numpy import load_file

from scaling.convert import transfer
from scaling.convert.facebookresearch import dit as facebookresearch
from scaling.errors import UserError
from scaling.models.dit import DiT
from scaling.run import restore
from scaling.run.options import Config
from scaling.training import config
from tests.support import parity
from tests.support.originals import pixels

PRETRAINED = str(Path(__file__).parents[2] / "configs/pretrained.py")
SMALL = {"width": 24, "depth": 2, "heads": 3, "num_classes": 10}
INPUTS: dict[str, np.ndarray] = {
    "x": np.random.default_rng(0).standard_normal((3, 32, 32, 4)).astype(np.float32),
    "t": np.array([0.0, 250.0, 999.0], np.float32),
    "y": np.array([3, 7, 10], np.int32),
}


def cfg(**more: Any) -> Config:
    return config.load(f"{PRETRAINED}:dit/S/8", {f"model.{k}": v for k, v in {**SMALL, **more}.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers saves it with its own defaults: frequencies and epsilon are not the paper's."""
    model = DiTTransformer2DModel(num_attention_heads=3, attention_head_dim=8, num_layers=2, out_channels=8,
                                  patch_size=8, num_embeds_ada_norm=10)  # fmt: skip
    parity.randomise(model, 0.2)
    embedders = [block.norm1.emb for block in model.transformer_blocks]
    embedders[1].load_state_dict(embedders[0].state_dict())
    made = tmp_path_factory.mktemp("dit")
    model.save_pretrained(made)
    return made


def theirs(folder: Path) -> np.ndarray:
    model = DiTTransformer2DModel.from_pretrained(folder, local_files_only=True).double().eval()
    t, y = torch.from_numpy(INPUTS["t"]).long(), torch.from_numpy(INPUTS["y"]).long()
    with torch.no_grad():
        return model(pixels(INPUTS["x"]), t, y).sample.permute(0, 2, 3, 1).numpy()


def ours(run: Path) -> np.ndarray:
    trained = restore.restore_run(run)
    return np.asarray(parity.jit(trained.run.model.apply)({"params": trained.weights["params"]}, **INPUTS))


def test_what_diffusers_trained_is_imported_and_exported_exactly(folder: Path, tmp_path: Path) -> None:
    said = transfer.import_run("diffusers", folder, cfg(), tmp_path / "run")
    assert said == ["model.frequency_shift=1, by config.json", "model.mlp_epsilon=1e-05, by config.json"]
    expected = theirs(folder)
    assert np.abs(ours(tmp_path / "run") - expected).max() < 1e-4 * np.abs(expected).max()

    transfer.export_run("diffusers", tmp_path / "run", tmp_path / "back")
    before, after = (
        load_file(f / "diffusion_pytorch_model.safetensors") for f in (folder, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(theirs(tmp_path / "back"), expected)
    assert not (tmp_path / "back/preprocessor_config.json").exists()  # latents have none


def test_the_authors_converted_weights_stay_as_the_authors_compute_them(folder: Path, tmp_path: Path) -> None:
    """In diffusers' names, or in the authors': the same function, which diffusers' is not."""
    stated = json.loads((folder / "config.json").read_text())
    converted = tmp_path / "converted"
    converted.mkdir()
    (converted / "config.json").write_text(json.dumps({**stated, "_class_name": "Transformer2DModel"}))
    (converted / "model.safetensors").write_bytes(
        (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    said = transfer.import_run("diffusers", converted, cfg(), tmp_path / "run")
    assert len(said) == 1 and said[0].startswith("_class_name=Transformer2DModel: is taken for the authors'")
    model = restore.restore_run(tmp_path / "run").run.model
    assert (model.frequency_shift, model.mlp_epsilon) == (0, 1e-6)
    out = ours(tmp_path / "run")
    assert np.abs(out - theirs(folder)).max() > 0.1 * np.abs(out).max()

    transfer.export_run("facebookresearch", tmp_path / "run", tmp_path / "original")
    transfer.import_run("facebookresearch", tmp_path / "original", cfg(), tmp_path / "again")
    np.testing.assert_array_equal(ours(tmp_path / "again"), out)
    with pytest.raises(
        UserError, match=r"model\.frequency_shift=0: diffusers' DiT has 1, .* as facebookresearch"
    ):
        transfer.export_run("diffusers", tmp_path / "run", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_what_is_given_by_hand_is_kept_and_said(folder: Path, tmp_path: Path) -> None:
    """A folder of the authors' weights that a newer diffusers wrote names the newer class."""
    given = cfg(frequency_shift=0, mlp_epsilon=1e-6)
    said = transfer.import_run("diffusers", folder, given, tmp_path / "run")
    assert said == [
        "model.frequency_shift=0 as given, where config.json has 1",
        "model.mlp_epsilon=1e-06 as given, where config.json has 1e-05",
    ]
    assert restore.restore_run(tmp_path / "run").run.model.frequency_shift == 0


def test_positions_for_another_side_are_refused(folder: Path, tmp_path: Path) -> None:
    """diffusers stretches them to the grid that `sample_size` names, and DiT does not."""
    stated = json.loads((folder / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({**stated, "sample_size": 64}))
    tensors = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "other/model.safetensors").write_bytes(tensors)
    with pytest.raises(
        UserError, match=r"config\.json: sample_size=64: the run's images are 32x32, for which diff"
    ):
        transfer.import_run("diffusers", tmp_path / "other", cfg(), tmp_path / "run")


def test_the_authors_format_has_no_other_frequencies() -> None:
    for options in ({"frequency_shift": 1}, {"mlp_epsilon": 1e-5}):
        with pytest.raises(UserError, match=rf"model\.{next(iter(options))}=.*: must be .*, the only one"):
            facebookresearch.table(DiT(**SMALL, **options))  # type: ignore[arg-type]
