"""transformers' ResNet folders: tables that lose nothing, folders that open there, other networks refused."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import ResNetConfig, ResNetForImageClassification

from scaling.convert import rules
from scaling.convert.huggingface import resnet as huggingface
from scaling.errors import UserError
from scaling.models import resnet
from tests.support import parity

SMALL: dict[str, Any] = {"depths": (2, 1, 3, 1), "width": 4, "num_classes": 7}
X = np.random.default_rng(0).standard_normal((2, 40, 33, 1)).astype(np.float32)


def of_config(bottleneck: bool) -> ResNetConfig:
    return ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[16, 32, 64, 128] if bottleneck else [4, 8, 16, 32],
        depths=[2, 1, 3, 1],
        layer_type="bottleneck" if bottleneck else "basic",
        num_labels=7,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["basic", "bottleneck"])
def case(request: Any) -> tuple[resnet.ResNet, dict[str, np.ndarray]]:
    """A model, and the tensors of transformers' file of one like it."""
    theirs = ResNetForImageClassification(of_config(request.param))
    parity.randomise(theirs)
    return resnet.ResNet(**SMALL, bottleneck=request.param), parity.saved(theirs)


def test_every_tensor_goes_over_and_back(case: Any) -> None:
    model, saved = case
    table, (ignored,) = huggingface.table(model), huggingface.IGNORED
    assert rules.faults(table, saved, jax.eval_shape(model.init, jax.random.key(0), X), [ignored]) == []
    back = rules.save(table, rules.load(table, saved))
    left = {name for name in saved if re.search(ignored, name)}
    assert set(back) == set(saved) - left
    assert all(name.endswith(".num_batches_tracked") for name in left)
    assert len(left) == sum(name.endswith(".running_var") for name in saved)
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, saved[name])


def test_layers_keep_their_order(case: Any) -> None:
    model, saved = case
    block = rules.load(huggingface.table(model), saved)["params"]["stage3"]["blocks"]["conv1"]["kernel"]
    for row, layer in enumerate((1, 2)):
        theirs = saved[f"resnet.encoder.stages.2.layers.{layer}.layer.0.convolution.weight"]
        np.testing.assert_array_equal(block[row], theirs.transpose(2, 3, 1, 0))


def test_a_written_folder_opens_there(case: Any, tmp_path: Path) -> None:
    model, saved = case
    variables = rules.load(huggingface.table(model), saved)
    config = huggingface.config(model, {"x": jax.ShapeDtypeStruct((1, *X.shape[1:]), X.dtype)})
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = rules.save(huggingface.table(model), variables) | huggingface.buffers(model, {"x": X})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened, info = ResNetForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert tensors.keys() == opened.state_dict().keys()  # a strict load, too, finds all counters
    with torch.no_grad():
        expected = opened.eval()(torch.from_numpy(X).permute(0, 3, 1, 2)).logits.numpy()
    ours = jax.device_get(parity.jit(model.apply)(variables, X))
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("variant", [size for size in resnet.SIZES if size not in resnet.LADDER])
def test_every_size_has_a_rule_for_every_variable(variant: str) -> None:
    model = resnet.make(variant)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **resnet.inputs(variant))
    ours = [path for rule in huggingface.table(model) for path in rule.paths]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    assert sorted(ours) == sorted("/".join(key.key for key in path) for path, _ in leaves)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_what_a_config_says_of_the_model(bottleneck: bool) -> None:
    fields = huggingface.fields(json.loads(of_config(bottleneck).to_json_string(use_diff=False)))
    assert fields == {"depths": (2, 1, 3, 1), "width": 4, "bottleneck": bottleneck}
    model = resnet.ResNet(**SMALL, bottleneck=bottleneck)
    config = huggingface.config(model, {"x": X})
    assert huggingface.fields(config) == fields
    for name, value in config.items():
        if name not in ("architectures", "id2label", "label2id", "torch_dtype"):
            assert getattr(of_config(bottleneck), name) == value, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu': the family resnet has 'relu' and no other"),
        ({"downsample_in_bottleneck": True}, "downsample_in_bottleneck=True: the family resnet has False"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage=True: the family resnet has False"),
        ({"hidden_sizes": [16, 32, 64, 256]}, r"hidden_sizes=\[16.*256\]: must be \[16, 32, 64, 128\]"),
    ],
)
def test_another_form_of_the_network_is_refused(change: dict[str, Any], message: str) -> None:
    config = huggingface.config(resnet.ResNet(**SMALL), {"x": X}) | change
    with pytest.raises(UserError, match=message):
        huggingface.fields(config)
