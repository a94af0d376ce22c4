"""Microsoft's names of Swin: those of its files, and the network that transformers names otherwise."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import SwinConfig, SwinForImageClassification

from scaling.convert import rules
from scaling.convert.huggingface import swin as huggingface
from scaling.convert.microsoft import swin as microsoft
from scaling.models import swin
from tests.support import originals, parity

MODEL = swin.Swin(patch=2, width=8, depths=(4, 2), heads=(1, 2), window=4, num_classes=7)
X = np.zeros((1, 16, 16, 3), np.float32)
RENAMED = {  # within a block
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@pytest.fixture(scope="module")
def saved() -> dict[str, np.ndarray]:
    """The tensors of transformers' file of a model like `MODEL`."""
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[4, 2], num_heads=[1, 2], window_size=4, num_labels=7
    )
    theirs = SwinForImageClassification(config)
    parity.randomise(theirs)
    return parity.saved(theirs)


@pytest.fixture(scope="module")
def renamed(saved: Any) -> dict[str, np.ndarray]:
    """The same in Microsoft's names, with query, key and value in one."""
    names = {
        "patch_embed.proj": "swin.embeddings.patch_embeddings.projection",
        "patch_embed.norm": "swin.embeddings.norm",
        "layers.0.downsample.norm": "swin.encoder.layers.0.downsample.norm",
        "norm": "swin.layernorm",
        "head": "classifier",
    }
    made = {
        "layers.0.downsample.reduction.weight": saved["swin.encoder.layers.0.downsample.reduction.weight"]
    }
    for stage, depth in enumerate((4, 2)):
        for i in range(depth):
            ours, theirs = f"layers.{stage}.blocks.{i}", f"swin.encoder.layers.{stage}.blocks.{i}"
            names |= {f"{ours}.{new}": f"{theirs}.{old}" for old, new in RENAMED.items()}
            table = "relative_position_bias_table"
            made[f"{ours}.attn.{table}"] = saved[f"{theirs}.attention.self.{table}"]
            for part in ("weight", "bias"):
                parts = [saved[f"{theirs}.attention.self.{n}.{part}"] for n in ("query", "key", "value")]
                made[f"{ours}.attn.qkv.{part}"] = np.concatenate(parts)
    for new, old in names.items():
        made |= {f"{new}.{part}": saved[f"{old}.{part}"] for part in ("weight", "bias")}
    return made


def test_the_renamed_network_is_the_same(saved: Any, renamed: Any) -> None:
    expected = rules.load(huggingface.table(MODEL), saved)
    loaded = rules.load(microsoft.table(MODEL), renamed)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_it_goes_there_and_back_with_its_buffers_and_gives_the_same() -> None:
    net = originals.Swin(False, 2, 8, (4, 2), (1, 2), window=4, side=16)
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    model = MODEL.clone(num_classes=1000)
    originals.compare(microsoft, model, net, {"x": x}, lambda net: net(originals.pixels(x)))


def test_names_and_shapes_are_those_of_the_files() -> None:
    model = swin.make("T")
    variables = jax.eval_shape(model.init, jax.random.key(0), **swin.inputs("T"))
    empty = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), variables)
    shapes = {name: t.shape for name, t in rules.save(microsoft.table(model), empty).items()}
    # 12 blocks of 13, three mergings of 3, and patch embedding, its norm, the last norm and the head.
    assert len(shapes) == 12 * 13 + 3 * 3 + 8
    assert shapes["patch_embed.proj.weight"] == (96, 3, 4, 4)
    assert shapes["layers.2.blocks.5.attn.qkv.weight"] == (1152, 384)
    assert shapes["layers.3.blocks.1.attn.relative_position_bias_table"] == (169, 24)
    assert shapes["layers.1.downsample.reduction.weight"] == (384, 768)
    assert shapes["head.weight"] == (1000, 768)
    with torch.device("meta"):
        net = originals.Swin(False, 4, 96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 224)
    names = originals.names(microsoft, model, swin.inputs("T"))
    assert names == sorted(net.state_dict())
    assert len(names) == 173 + 12 + 5  # an index in every block, and masks in shifted ones of three stages


def test_the_window_is_read_from_the_tables(renamed: Any) -> None:
    assert microsoft.source(MODEL.clone(window=7), renamed, None) == MODEL
    assert microsoft.source(MODEL, {}, None) == MODEL
