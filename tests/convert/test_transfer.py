"""Import and export of runs: a Hugging Face ViT in, trained on, out, and opened by transformers again."""

import json
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from scaling.convert import files, transfer
from scaling.errors import UserError
from scaling.run import restore
from scaling.run.options import Config
from scaling.training import config, loop
from tests.support import parity

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/support/tiny_vit.py")
OVERRIDES = ["model.epsilon=1e-12", "train.duration=4 steps", "optimizer.ema_decays=(0.9,)"]


def cfg(*more: str) -> Config:
    return config.load(TINY, [*OVERRIDES, *more])


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers saves it: the tiny config's model for 8x8 digits."""
    options = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8,
        patch_size=4, num_channels=1, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(options)
    parity.randomise(model)
    folder = tmp_path_factory.mktemp("outside")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(outside: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "imported"
    assert transfer.import_run("huggingface", outside, cfg(), run) == []
    return run


def logits(folder: Path, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        model = ViTForImageClassification.from_pretrained(folder, local_files_only=True).eval()
        return model(torch.from_numpy(x).permute(0, 3, 1, 2)).logits.numpy()


def test_import_then_export_gives_the_same_tensors_and_outputs(
    outside: Path, imported: Path, tmp_path: Path
) -> None:
    transfer.export_run("huggingface", imported, tmp_path / "back")
    before, after = load_file(outside / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    np.testing.assert_array_equal(logits(outside, x), logits(tmp_path / "back", x))
    trained = restore.restore_run(imported)
    ours = trained.run.model.apply({"params": trained.weights["params"]}, jnp.asarray(x))
    np.testing.assert_allclose(ours, logits(outside, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="exists"):
        transfer.export_run("huggingface", imported, tmp_path / "back")


def test_an_exported_folder_is_readable_by_all_and_proves_its_bits(imported: Path, tmp_path: Path) -> None:
    transfer.export_run("huggingface", imported, tmp_path / "back")
    (tmp_path / "usual").touch()
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "back").iterdir()}
    assert modes == dict.fromkeys(modes, (tmp_path / "usual").stat().st_mode)
    check = ["sha256sum", "--check", "--strict", "--quiet", files.SUMS]
    subprocess.run(check, cwd=tmp_path / "back", check=True)
    transfer.import_run("huggingface", tmp_path / "back", cfg(), tmp_path / "again")
    weights = bytearray((tmp_path / "back/model.safetensors").read_bytes())
    weights[-3] ^= 1
    (tmp_path / "back/model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model.safetensors: is not what SHA256SUMS lists; copy it again"):
        transfer.import_run("huggingface", tmp_path / "back", cfg(), tmp_path / "damaged")


def test_an_imported_run_is_done_and_trains_on(outside: Path, tmp_path: Path) -> None:
    transfer.import_run("huggingface", outside, cfg(), tmp_path / "run")
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "done"
    start = jax.device_get(restore.restore_run(tmp_path / "run").weights["params"])
    loop.train(cfg(), tmp_path / "run")
    trained = restore.restore_run(tmp_path / "run")
    assert trained.step == 4
    moved = np.abs(trained.weights["params"]["head"]["kernel"] - start["head"]["kernel"]).max()
    assert 0 < moved < 0.01  # four steps from the imported weights, not from others
    with pytest.raises(UserError, match="exists; choose another folder"):
        transfer.import_run("huggingface", outside, cfg(), tmp_path / "run")


def altered(outside: Path, folder: Path, change: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((outside / "config.json").read_text())
    tensors = load_file(outside / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_file_that_does_not_fit_is_refused_by_name(outside: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["extra"] = tensors.pop("vit.layernorm.weight")
        tensors["classifier.weight"] = np.zeros((7, 16), np.float32)

    source = altered(outside, tmp_path / "other", change)
    message = (
        r"does not fit the config: missing vit\.layernorm\.weight; unexpected extra; "
        r"classifier\.weight has shape \(7, 16\), not \(10, 16\)$"
    )
    with pytest.raises(UserError, match=message):
        transfer.import_run("huggingface", source, cfg(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.heads=4", "heads=2, and model.heads=4; give --config.model.heads=2"),
        ("model.epsilon=1e-6", "epsilon=1e-12, and model.epsilon=1e-06"),
    ],
)
def test_what_shapes_cannot_show_is_read_from_the_folders_config(
    outside: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        transfer.import_run("huggingface", outside, cfg(override), tmp_path / "run")


def test_a_head_starts_afresh_only_when_asked_for(outside: Path, tmp_path: Path) -> None:
    other = cfg("model.num_classes=12")
    with pytest.raises(UserError, match=r"classifier\.weight has shape \(10, 16\), not \(12, 16\)"):
        transfer.import_run("huggingface", outside, other, tmp_path / "run")
    said = transfer.import_run("huggingface", outside, other, tmp_path / "run", ["head"])
    assert said == ["head: starts afresh"]
    params = restore.restore_run(tmp_path / "run").weights["params"]
    assert params["head"]["kernel"].shape == (16, 12) and not np.any(params["head"]["kernel"])
    np.testing.assert_array_equal(
        params["norm"]["scale"], load_file(outside / "model.safetensors")["vit.layernorm.weight"]
    )
    with pytest.raises(UserError, match="reinit='heads': no parameter of vit has this path"):
        transfer.import_run("huggingface", outside, other, tmp_path / "run2", ["heads"])


def test_another_resolution_resizes_the_positions_and_says_so(outside: Path, tmp_path: Path) -> None:
    said = transfer.import_run("huggingface", outside, cfg("model.resolution=16"), tmp_path / "run")
    assert said == ["positions: resized from 2x2 to 4x4 patches"]
    assert restore.restore_run(tmp_path / "run").weights["params"]["positions"].shape == (17, 16)


BAD: dict[str, tuple[Any, str]] = {  # a bad file's content, of a whole one's, and what is said of it
    "cut.safetensors": (lambda whole: whole[:-7], "cannot be read as safetensors"),
    "text.pt": (lambda _: b"hello", "cannot be read as tensors alone"),
    "evil.bin": (lambda _: pickle.dumps({"a": print}, protocol=2), "it would call .*print"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_leaves_everything_as_it_was(outside: Path, tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content((outside / "model.safetensors").read_bytes()))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("kept")
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        transfer.import_run("huggingface", tmp_path / name, cfg(), tmp_path / "new")
    with pytest.raises(UserError, match="old: exists; choose another folder, nothing is written over"):
        transfer.import_run("huggingface", outside, cfg(), tmp_path / "old")
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([name, "old"])
    assert [(f.name, f.read_text()) for f in (tmp_path / "old").iterdir()] == [("config.json", "kept")]


def test_a_folder_of_another_family_is_refused(outside: Path, tmp_path: Path) -> None:
    shutil.copytree(outside, tmp_path / "other")
    for content, message in (
        ('{"d_model": 16}', "d_model=16: is no known field of the family vit, and may change what"),
        ('{"model_type": "deit"}', "model_type='deit': the family vit has 'vit' and no other"),
        (
            '{"hidden_size": "16", "intermediate_size": []}',
            r"is not of the family vit \(\w+Error: .*\); give one",
        ),
    ):
        (tmp_path / "other/config.json").write_text(content)
        with pytest.raises(UserError, match=rf"other/config\.json: {message}"):
            transfer.import_run("huggingface", tmp_path / "other", cfg(), tmp_path / "run")


def test_unknown_formats_and_families(outside: Path, imported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format='keras': must be one of huggingface"):
        transfer.export_run("keras", imported, tmp_path / "out")
    with pytest.raises(UserError, match="format='diffusers': has no vit; it has dit"):
        transfer.export_run("diffusers", imported, tmp_path / "out")
