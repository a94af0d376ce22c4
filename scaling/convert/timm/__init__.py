"""timm's state dicts, as of its version 0.9."""

from typing import Any

from scaling.convert.converter import Converter
from scaling.convert.timm import swin, vit

FAMILIES: dict[str, Converter[Any]] = {
    "swin": swin.CONVERTER,
    "vit": vit.CONVERTER,
}
