"""torchvision's names of ResNet: those of its files, and the network that transformers names otherwise."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from transformers import ResNetConfig, ResNetForImageClassification

from scaling.convert import rules
from scaling.convert.huggingface import resnet as huggingface
from scaling.convert.torchvision import resnet as torchvision
from scaling.models import resnet
from tests.support import parity

# The number of tensors in torchvision's state dicts, with one num_batches_tracked a norm.
TENSORS = {"18": 122, "34": 218, "50": 320, "101": 626, "152": 932}
CONVOLUTIONS = {  # [out, in, down, across]
    "18": {
        "conv1": (64, 3, 7, 7),
        "layer1.0.conv1": (64, 64, 3, 3),
        "layer1.0.conv2": (64, 64, 3, 3),
        "layer1.1.conv2": (64, 64, 3, 3),
        "layer2.0.conv1": (128, 64, 3, 3),
        "layer2.0.downsample.0": (128, 64, 1, 1),
        "layer4.0.downsample.0": (512, 256, 1, 1),
        "layer4.1.conv1": (512, 512, 3, 3),
    },
    "50": {
        "conv1": (64, 3, 7, 7),
        "layer1.0.conv1": (64, 64, 1, 1),
        "layer1.0.conv2": (64, 64, 3, 3),
        "layer1.0.conv3": (256, 64, 1, 1),
        "layer1.0.downsample.0": (256, 64, 1, 1),
        "layer1.2.conv1": (64, 256, 1, 1),
        "layer3.5.conv3": (1024, 256, 1, 1),
        "layer4.0.conv1": (512, 1024, 1, 1),
        "layer4.0.downsample.0": (2048, 1024, 1, 1),
        "layer4.2.conv3": (2048, 512, 1, 1),
    },
}
NORMS = {"18": {"bn1": 64, "layer1.1.bn2": 64, "layer2.0.downsample.1": 128, "layer4.1.bn2": 512}}
NORMS["50"] = {"bn1": 64, "layer1.0.downsample.1": 256, "layer2.3.bn2": 128, "layer4.2.bn3": 2048}


@pytest.mark.parametrize("variant", TENSORS)
def test_names_and_shapes_are_those_of_the_files(variant: str) -> None:
    model = resnet.make(variant)
    variables = jax.eval_shape(model.init, jax.random.key(0), **resnet.inputs(variant))
    empty = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), variables)
    shapes = {name: t.shape for name, t in rules.save(torchvision.table(model), empty).items()}
    assert len(shapes) + sum(name.endswith("running_var") for name in shapes) == TENSORS[variant]
    assert shapes["fc.weight"] == (1000, 512 * (4 if model.bottleneck else 1))
    assert shapes["fc.bias"] == (1000,)
    for name, shape in CONVOLUTIONS.get(variant, {}).items():
        assert shapes[f"{name}.weight"] == shape
        assert f"{name}.bias" not in shapes
    for name, width in NORMS.get(variant, {}).items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert shapes[f"{name}.{part}"] == (width,)
    assert ("layer1.0.downsample.0.weight" in shapes) == model.bottleneck


RENAMED = (  # transformers' names to torchvision's
    (r"^resnet\.embedder\.embedder\.convolution\.", "conv1."),
    (r"^resnet\.embedder\.embedder\.normalization\.", "bn1."),
    (r"^resnet\.encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"^classifier\.1\.", "fc."),
)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_it_is_the_network_of_transformers_under_other_names(bottleneck: bool) -> None:
    widths = [16, 32, 64, 128] if bottleneck else [4, 8, 16, 32]
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=widths,
        depths=[2, 1, 3, 1],
        layer_type="bottleneck" if bottleneck else "basic",
    )
    theirs = ResNetForImageClassification(config)
    parity.randomise(theirs)
    saved = parity.saved(theirs)
    renamed = {}
    for name, tensor in saved.items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)  # type: ignore[call-overload]
        renamed[name] = tensor
    model = resnet.ResNet(depths=(2, 1, 3, 1), width=4, num_classes=2, bottleneck=bottleneck)
    table = torchvision.table(model)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert rules.faults(table, renamed, shapes, torchvision.IGNORED) == []
    variables: Any = rules.load(table, renamed)
    expected = rules.load(huggingface.table(model), saved)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    for name, tensor in rules.save(table, variables).items():
        np.testing.assert_array_equal(tensor, renamed.pop(name))
    counters = torchvision.buffers(model, {"x": x})
    assert counters.keys() == renamed.keys()
    for name, counter in counters.items():
        assert (counter.shape, counter.dtype) == (renamed[name].shape, renamed[name].dtype)
