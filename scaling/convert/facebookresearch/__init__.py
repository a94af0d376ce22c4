"""State dicts of Meta's research code."""

from typing import Any

from scaling.convert.converter import Converter
from scaling.convert.facebookresearch import dit

FAMILIES: dict[str, Converter[Any]] = {
    "dit": dit.CONVERTER,
}
