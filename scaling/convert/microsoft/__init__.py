"""Microsoft's original state dicts."""

from typing import Any

from scaling.convert.converter import Converter
from scaling.convert.microsoft import swin

FAMILIES: dict[str, Converter[Any]] = {
    "swin": swin.CONVERTER,
}
