"""ResNet as transformers' `ResNetForImageClassification`."""

from collections.abc import Mapping
from typing import Any

from scaling.convert import rules
from scaling.convert.rules import Layers, Rules
from scaling.errors import UserError
from scaling.models.resnet import EXPANSION, ResNet

IGNORED = (r"\.num_batches_tracked$",)  # counts training steps, which nothing reads
FIXED = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}


def table(model: ResNet) -> Rules:
    """The tensors of model.safetensors."""
    found = _layer("resnet.embedder.embedder", "stem", "norm_stem")
    for i, depth in enumerate(model.depths):
        theirs, ours = f"resnet.encoder.stages.{i}.layers", f"stage{i + 1}"
        found += _block(f"{theirs}.0", f"{ours}/first", model.bottleneck)
        if i > 0 or model.bottleneck:
            found += _layer(f"{theirs}.0.shortcut", f"{ours}/first/shortcut", f"{ours}/first/norm_shortcut")
        if depth > 1:
            found += _block(theirs + ".{i}", f"{ours}/blocks", model.bottleneck, range(1, depth))
    return found + rules.linear("classifier.1", "head")


def _block(theirs: str, ours: str, bottleneck: bool, layers: Layers = None) -> Rules:
    found: Rules = []
    for j in range(3 if bottleneck else 2):
        found += _layer(f"{theirs}.layer.{j}", f"{ours}/conv{j + 1}", f"{ours}/norm{j + 1}", layers)
    return found


def _layer(theirs: str, conv: str, norm: str, layers: Layers = None) -> Rules:
    return [
        *rules.convolution(f"{theirs}.convolution", conv, layers, bias=False),
        *rules.batch_norm(f"{theirs}.normalization", norm, layers),
    ]


def config(model: ResNet, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, as `from_pretrained` needs it; `inputs` are the model's, by name."""
    widest = model.width * (EXPANSION if model.bottleneck else 1)
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "num_channels": inputs["x"].shape[-1],
        "embedding_size": model.width,
        "hidden_sizes": [widest * 2**i for i in range(len(model.depths))],
        "depths": list(model.depths),
        "layer_type": "bottleneck" if model.bottleneck else "basic",
        **FIXED,
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's config.json says of the model, in the names of its fields.

    Raises: UserError for a network that is none of these: another activation, the stride elsewhere, or
    stages that do not double in width.
    """
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{name}={config[name]}: must be {value}; no other form of ResNet can be loaded")
    width, bottleneck = config["embedding_size"], config["layer_type"] == "bottleneck"
    sizes = [width * (EXPANSION if bottleneck else 1) * 2**i for i in range(4)]
    if list(config["hidden_sizes"]) != sizes:
        raise UserError(f"hidden_sizes={config['hidden_sizes']}: must be {sizes}, as embedding_size={width}")
    return {"width": width, "depths": tuple(config["depths"]), "bottleneck": bottleneck}
