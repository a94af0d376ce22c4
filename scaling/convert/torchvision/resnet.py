"""ResNet as torchvision's `resnet18` to `resnet152` name its tensors, and timm's of the same names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling.convert import layouts, rules
from scaling.convert.preprocessing import Seen, usual
from scaling.convert.rules import Rules
from scaling.models.resnet import ResNet
from scaling.preprocessing import IMAGENET

IGNORED = layouts.COUNTERS


def table(model: ResNet) -> Rules:
    """The tensors of a state dict, but for its counters."""
    layouts.only(model, stem="7x7")
    return [
        *layouts.normed_convolution("conv1", "bn1", "stem", "norm_stem"),
        *layouts.resnet_stages(model.depths, model.bottleneck, layouts.TORCHVISION),
        *rules.linear("fc", "head"),
    ]


def buffers(model: ResNet, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The counters."""
    return layouts.counters(table(model))


def preprocessing(model: ResNet) -> Seen:
    """Returns what such weights usually see."""
    return usual("torchvision's first weights", IMAGENET, short=0.875, resample="bilinear")
