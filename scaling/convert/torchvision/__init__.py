"""torchvision's state dicts."""

from typing import Any

from scaling.convert.converter import Converter
from scaling.convert.torchvision import resnet

FAMILIES: dict[str, Converter[Any]] = {
    "resnet": resnet.CONVERTER,
}
