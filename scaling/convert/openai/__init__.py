"""State dicts of OpenAI's research code."""

from types import ModuleType

from scaling.convert.openai import clip

FAMILIES: dict[str, ModuleType] = {
    "clip": clip,
}
