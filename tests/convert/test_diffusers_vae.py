"""The autoencoder as a diffusers folder: bit for bit, opened there, older files, and other forms refused."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.numpy import save_file

from scaling.convert import naming, rules
from scaling.convert.diffusers import vae as diffusers_vae
from scaling.errors import UserError
from scaling.models import vae
from tests.support import parity

MODEL = vae.VAE(widths=(4, 8, 8), blocks=1, groups=2, latent_channels=3, channels=2, latent_scale=0.5)
INPUTS = {"x": jax.ShapeDtypeStruct((1, 16, 16, 2), np.float32)}
X = np.random.default_rng(0).standard_normal((2, 16, 16, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """Those of a random AutoencoderKL, as its own `save_pretrained` writes them."""
    config = diffusers_vae.config(MODEL, INPUTS)
    del config["_class_name"]
    reference = AutoencoderKL(**config)
    parity.randomise(reference)
    return parity.saved(reference)


def opened(folder: Path, tensors: dict[str, np.ndarray]) -> AutoencoderKL:
    (folder / "config.json").write_text(json.dumps(diffusers_vae.config(MODEL, INPUTS)))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return AutoencoderKL.from_pretrained(folder)


def reconstruction(reference: AutoencoderKL) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.from_numpy(X).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1).numpy()


def test_loading_and_saving_gives_the_same_bits(tensors: dict[str, np.ndarray]) -> None:
    table = diffusers_vae.table(MODEL)
    variables = rules.load(table, tensors)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), **INPUTS)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
    again = rules.save(table, variables)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert again[name].tobytes() == tensor.tobytes(), name


def test_diffusers_opens_what_is_saved(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    table = diffusers_vae.table(MODEL)
    variables = rules.load(table, tensors)
    reference = opened(tmp_path, rules.save(table, variables))
    ours = np.asarray(parity.jit(MODEL.apply)(variables, X))
    theirs = reconstruction(reference)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert reference.config.scaling_factor == 0.5


def test_older_names_of_attention(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A file in the older names opens in diffusers, and RENAMED gives them the newer ones."""
    older = dict(
        zip(("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn"), strict=True)
    )
    file = {}
    for name, tensor in tensors.items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        file[name] = tensor
    assert len(set(file) - set(tensors)) == 16
    newer, said = naming.known(diffusers_vae.CONVERTER, diffusers_vae.table(MODEL), file)
    assert said == [f"names: those of older diffusers taken in 16 of {len(file)}"]
    assert {n: t.tobytes() for n, t in newer.items()} == {n: t.tobytes() for n, t in tensors.items()}
    (tmp_path / "older").mkdir()
    (tmp_path / "newer").mkdir()
    expected = reconstruction(opened(tmp_path / "newer", tensors))
    np.testing.assert_array_equal(reconstruction(opened(tmp_path / "older", file)), expected)


def test_config_and_fields_agree() -> None:
    config = json.loads(json.dumps(diffusers_vae.config(MODEL, INPUTS)))
    assert vae.VAE(**diffusers_vae.fields(config)) == MODEL
    assert config["sample_size"] == 16


def test_a_config_without_what_is_usual_is_stable_diffusions() -> None:
    """As stabilityai/sd-vae-ft-mse has it."""
    config = {
        "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32, "sample_size": 256,
        "act_fn": "silu",
    }  # fmt: skip
    assert vae.VAE(**diffusers_vae.fields(config)) == vae.make("SD")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shift_factor", 0.1159),
        ("use_quant_conv", False),
        ("mid_block_add_attention", False),
        ("act_fn", "gelu"),
        ("out_channels", 6),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
    ],
)
def test_other_forms_are_refused(key: str, value: Any) -> None:
    config = diffusers_vae.config(MODEL, INPUTS) | {key: value}
    with pytest.raises(UserError, match=re.escape(f"{key}={value!r}: the family vae has ")):
        diffusers_vae.fields(config)


def test_another_epsilon_cannot_be_exported() -> None:
    with pytest.raises(UserError, match=r"epsilon=1e-05: diffusers' AutoencoderKL has 1e-06 and no other"):
        diffusers_vae.config(MODEL.clone(epsilon=1e-5), INPUTS)
