"""U-Nets as folders of diffusers: opened by its own `from_pretrained`, and back bit for bit."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.numpy import load_file, save_file

from scaling.convert import rules
from scaling.convert.diffusers import unet as diffusers_unet
from scaling.errors import UserError
from scaling.models import unet
from tests.support import parity

BASE: dict[str, Any] = {"width": 8, "groups": 4, "num_classes": 10, "depth": 1, "epsilon": 1e-4}
ADM = unet.UNet(**BASE, multipliers=(1, 3), attention=(1,), head_width=4)
LDM = unet.UNet(**BASE, kind="ldm", multipliers=(1,), attention=(1,), heads=2, context=12, learn_sigma=False)
FORMS = {"adm": UNet2DModel, "ldm": UNet2DConditionModel}
MODELS = pytest.mark.parametrize("model", [ADM, LDM], ids=["adm", "ldm"])
RNG = np.random.default_rng(0)
INPUTS: dict[str, Any] = {
    "x": RNG.standard_normal((2, 4, 4, 3)).astype(np.float32),
    "t": np.array([3.0, 700.0], np.float32),
    "y": np.array([4, 10], np.int32),
}


@MODELS
def test_an_exported_folder_opens_in_diffusers_and_gives_the_same(model: unet.UNet, tmp_path: Path) -> None:
    table = diffusers_unet.table(model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **INPUTS)
    variables = jax.tree.map(lambda s: (0.3 * RNG.standard_normal(s.shape)).astype(np.float32), shapes)
    tensors = rules.save(table, variables)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    config = diffusers_unet.config(model, INPUTS)
    (tmp_path / "config.json").write_text(json.dumps(config))

    opened, notes = FORMS[model.kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values())
    x, t = torch.from_numpy(INPUTS["x"]).permute(0, 3, 1, 2), torch.from_numpy(INPUTS["t"])
    y = torch.from_numpy(INPUTS["y"]).long()
    if model.kind == "ldm":
        y = torch.nn.functional.one_hot(y, 11).float()[:, None]
    with torch.no_grad():
        expected = opened.eval()(x, t, y).sample.permute(0, 2, 3, 1).numpy()
    out = parity.jit(model.apply)(variables, **INPUTS)
    assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()

    opened.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == tensors.keys()
    assert rules.faults(table, again, shapes, ()) == []
    back = rules.load(table, again)
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(back), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    stated = diffusers_unet.fields(json.loads((tmp_path / "again" / "config.json").read_text()))
    assert len(stated) == 11
    for name, value in stated.items():
        assert getattr(model, name) == value, name


@pytest.mark.parametrize("variant", ["ADM-64", "ADM-256", "LDM-4", "LDM-8", "small"])
def test_a_variants_fields_are_read_back_from_its_config(variant: str) -> None:
    model = unet.make(variant)
    stated = diffusers_unet.fields(diffusers_unet.config(model, unet.inputs(variant)))
    assert {"kind", "width", "multipliers", "depth", "attention", "groups"} <= set(stated)
    for name, value in stated.items():
        assert getattr(model, name) == value, name


@pytest.mark.parametrize("variant", ["ADM-64", "ADM-256", "LDM-4", "LDM-8", "small"])
def test_a_variants_table_names_the_tensors_of_diffusers(variant: str) -> None:
    model = unet.make(variant)
    config = diffusers_unet.config(model, unet.inputs(variant))
    with torch.device("meta"):
        reference = FORMS[model.kind].from_config(config)
    names = [name for rule in diffusers_unet.table(model) for name in rules.names(rule)]
    assert sorted(names) == sorted(reference.state_dict())


def test_a_label_table_has_no_bias() -> None:
    shapes = jax.eval_shape(LDM.init, jax.random.key(0), **INPUTS)
    table = diffusers_unet.table(LDM)
    tensors = rules.save(table, jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes))
    assert not np.any(tensors["encoder_hid_proj.bias"])
    wrong = {**tensors, "encoder_hid_proj.bias": np.zeros(13, np.float32)}
    assert "encoder_hid_proj.bias has shape (13,), not (12,)" in rules.faults(table, wrong, shapes, ())
    tensors["encoder_hid_proj.bias"] = np.full(12, 0.5, np.float32)
    with pytest.raises(UserError, match=r"encoder_hid_proj\.bias: must be 0"):
        rules.load(table, tensors)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ADM.clone(upsampler=True), "upsampler=True: diffusers has no U-Net that resizes"),
        (ADM.clone(heads=2), "heads=2: diffusers' UNet2DModel has heads of one width"),
        (LDM.clone(multipliers=(2,)), r"multipliers=\(2,\): diffusers' U-Nets begin with 1"),
    ],
)
def test_what_diffusers_has_no_form_of_is_said(model: unet.UNet, message: str) -> None:
    for write in (diffusers_unet.table, lambda model: diffusers_unet.config(model, INPUTS)):
        with pytest.raises(UserError, match=message):
            write(model)


@pytest.mark.parametrize(
    ("model", "changed", "message"),
    [
        (ADM, {"_class_name": "UNet1DModel"}, "_class_name='UNet1DModel': must be UNet2DModel or"),
        (ADM, {"resnet_time_scale_shift": "default"}, "the family unet has 'scale_shift' and no other"),
        (ADM, {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, r"down_block_types=\['DownBlock2D'"),
        (ADM, {"attn_norm_num_groups": None}, "attn_norm_num_groups=None: the family unet has 4"),
        (ADM, {"num_class_embeds": None}, "num_class_embeds=None: .* class-conditional models only"),
        (LDM, {"use_linear_projection": True}, "use_linear_projection=True: the family unet has False"),
        (LDM, {"freq_shift": 1}, "freq_shift=1: the family unet has 0 and no other"),
    ],
)
def test_a_config_of_another_form_is_refused(model: Any, changed: dict[str, Any], message: str) -> None:
    config = diffusers_unet.config(model, {"x": jnp.zeros((1, 8, 8, 3))}) | changed
    with pytest.raises(UserError, match=message) as error:
        diffusers_unet.fields(config)
    assert "\n" not in str(error.value)
