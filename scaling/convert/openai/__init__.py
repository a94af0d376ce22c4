"""State dicts of OpenAI's research code."""

from typing import Any

from scaling.convert.converter import Converter
from scaling.convert.openai import clip

FAMILIES: dict[str, Converter[Any]] = {
    "clip": clip.CONVERTER,
}
