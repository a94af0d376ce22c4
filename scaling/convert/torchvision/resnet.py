"""ResNet with the tensor names of torchvision's `resnet18` to `resnet152`, which timm's models share."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.convert import layouts, rules
from scaling.convert.converter import Converter
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules
from scaling.models.resnet import ResNet
from scaling.preprocessing import IMAGENET

IGNORED = layouts.COUNTERS


def table(model: ResNet) -> Rules:
    """Returns the rules for the tensors of a state dict, except its counters."""
    layouts.only(model, stem="7x7")
    return [
        *layouts.normed_convolution("conv1", "bn1", "stem", "norm_stem"),
        *layouts.resnet_stages(model.depths, model.bottleneck, layouts.TORCHVISION),
        *rules.linear("fc", "head"),
    ]


def buffers(model: ResNet, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the counters of training steps."""
    return layouts.counters(table(model))


def preprocessing(model: ResNet) -> Seen:
    """Returns the usual preprocessing of such weights."""
    return usual("torchvision's first weights", IMAGENET, short=0.875, resample="bilinear")


CONVERTER = Converter(
    table=table,
    ignored=IGNORED,
    buffers=buffers,
    preprocessing=preprocessing,
)
