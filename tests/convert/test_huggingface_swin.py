"""transformers' Swin folders: a table that loses nothing, a folder that opens there, others refused."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import SwinConfig, SwinForImageClassification

from scaling.convert import rules
from scaling.convert.huggingface import swin as huggingface
from scaling.errors import UserError
from scaling.models import swin
from tests.support import parity

MODEL = swin.Swin(
    patch=2, width=8, depths=(4, 2), heads=(1, 2), window=4, num_classes=7, resolution=16, mlp_ratio=2.0
)
X = np.random.default_rng(0).standard_normal((2, 16, 16, 1)).astype(np.float32)
INPUTS = {"x": jax.ShapeDtypeStruct((1, 16, 16, 1), np.float32)}
CONFIG = SwinConfig(
    image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[4, 2], num_heads=[1, 2],
    window_size=4, num_labels=7, mlp_ratio=2.0, drop_path_rate=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved() -> dict[str, np.ndarray]:
    """The tensors of transformers' file of a model like `MODEL`."""
    theirs = SwinForImageClassification(CONFIG)
    parity.randomise(theirs)
    return parity.saved(theirs)


def test_every_tensor_goes_over_and_back(saved: Any) -> None:
    table, shapes = huggingface.table(MODEL), jax.eval_shape(MODEL.init, jax.random.key(0), X)
    older = {f"swin.encoder.layers.{i}.blocks.0.attention.self.relative_position_index": X for i in (0, 1)}
    assert rules.faults(table, saved | older, shapes, huggingface.IGNORED) == []
    back = rules.save(table, rules.load(table, saved))
    assert set(back) == set(saved)
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, saved[name])


def test_a_written_folder_opens_there(saved: Any, tmp_path: Path) -> None:
    variables = rules.load(huggingface.table(MODEL), saved)
    (tmp_path / "config.json").write_text(json.dumps(huggingface.config(MODEL, INPUTS)))
    tensors = rules.save(huggingface.table(MODEL), variables)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened, info = SwinForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = opened.eval()(torch.from_numpy(X).permute(0, 3, 1, 2)).logits.numpy()
    ours = jax.device_get(parity.jit(MODEL.apply)(variables, X))
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_what_a_config_says_of_the_model() -> None:
    written = huggingface.config(MODEL, INPUTS)
    for name, value in written.items():
        if name not in ("architectures", "id2label", "label2id", "torch_dtype"):
            assert getattr(CONFIG, name) == value, name
    fields = huggingface.fields(json.loads(CONFIG.to_json_string(use_diff=False)))
    assert fields == {
        "width": 8, "depths": (4, 2), "heads": (1, 2), "window": 4, "mlp_ratio": 2.0, "patch": 2,
        "epsilon": 1e-5,
    }  # fmt: skip
    assert fields == huggingface.fields(written)
    wide = huggingface.config(MODEL.clone(resolution=(16, 24)), INPUTS)
    assert wide["image_size"] == [16, 24]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new': the family swin has 'gelu'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06: the family swin has 1e-05"),
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings=True: the family swin has False"),
        ({"qkv_bias": False}, "qkv_bias=False: the family swin has True"),
    ],
)
def test_another_form_of_the_network_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        huggingface.fields(huggingface.config(MODEL, INPUTS) | change)


def test_an_epsilon_that_transformers_has_not_is_refused() -> None:
    with pytest.raises(UserError, match="epsilon=1e-06: must be 1e-05 for transformers"):
        huggingface.config(MODEL.clone(epsilon=1e-6), INPUTS)


def test_tensors_for_another_window_are_resized(saved: Any) -> None:
    wanted = MODEL.clone(window=5)
    found = huggingface.source(wanted, saved, None)
    assert found == MODEL
    assert huggingface.source(wanted, {}, None) == wanted
    variables = rules.load(huggingface.table(found), saved)
    made, said = swin.resized(variables, found, wanted)
    assert said == ["relative_bias: resized from windows of 4 to windows of 5"]
    shapes = jax.eval_shape(wanted.init, jax.random.key(0), X)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, shapes)
    old, new = (tree["params"]["stage1"]["shifted"] for tree in (variables, made))
    row = swin.resize_relative_bias(old["attention"]["relative_bias"][1], 4, 5)
    np.testing.assert_array_equal(new["attention"]["relative_bias"][1], row)
    np.testing.assert_array_equal(new["mlp"]["up"]["kernel"], old["mlp"]["up"]["kernel"])
    assert swin.resized(variables, found, found) == (variables, [])
