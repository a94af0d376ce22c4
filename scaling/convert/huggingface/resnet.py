"""ResNet as transformers' `ResNetForImageClassification`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.convert import foreign, layouts, rules
from scaling.convert.converter import ConfigFile, Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules
from scaling.errors import UserError
from scaling.models.resnet import EXPANSION, ResNet
from scaling.preprocessing import IMAGENET

IGNORED = layouts.COUNTERS
FIXED = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
FIELDS = foreign.transformers(
    "resnet",
    compared={
        "embedding_size": 64,
        "hidden_sizes": [256, 512, 1024, 2048],
        "depths": [3, 4, 6, 3],
        "layer_type": "bottleneck",
    },
    only={"model_type": "resnet", **FIXED},
    free="num_channels out_features out_indices stage_names reshape_last_stage",
)
BASE = "resnet."
NAMES = layouts.ResNetNames(
    stage="resnet.encoder.stages.{stage}.layers",
    convolution="layer.{j}.convolution",
    norm="layer.{j}.normalization",
    shortcut=("shortcut.convolution", "shortcut.normalization"),
    first=0,
)


def table(model: ResNet) -> Rules:
    """Returns the rules for the tensors of model.safetensors, except its counters."""
    layouts.only(model, stem="7x7")
    stem = "resnet.embedder.embedder"
    return [
        *layouts.normed_convolution(f"{stem}.convolution", f"{stem}.normalization", "stem", "norm_stem"),
        *layouts.resnet_stages(model.depths, model.bottleneck, NAMES),
        *rules.linear("classifier.1", "head"),
    ]


def buffers(model: ResNet, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the counters of training steps."""
    return layouts.counters(table(model))


def config(model: ResNet, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as `from_pretrained` needs it; `inputs` are the model's, by name."""
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
        **layouts.labels(model.num_classes),
        "torch_dtype": "float32",
    }


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model, in the names of the model's fields.

    Raises:
        UserError: if the network differs: another activation, the stride elsewhere, or stages that do not
            double in width.
    """
    config = FIELDS.read(config)
    width, bottleneck = config["embedding_size"], config["layer_type"] == "bottleneck"
    sizes = [width * (EXPANSION if bottleneck else 1) * 2**i for i in range(4)]
    if list(config["hidden_sizes"]) != sizes:
        raise UserError(f"hidden_sizes={config['hidden_sizes']}: must be {sizes}, as embedding_size={width}")
    return {"width": width, "depths": tuple(config["depths"]), "bottleneck": bottleneck}


def preprocessing(model: ResNet) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("transformers' ResNet", IMAGENET, short=0.875)


CONVERTER = Converter(
    table=table,
    config_file=ConfigFile(config=config, fields=fields),
    ignored=IGNORED,
    base=BASE,
    buffers=buffers,
    preprocessing=preprocessing,
)
