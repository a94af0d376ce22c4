"""State dicts of Meta's research code."""

from types import ModuleType

from scaling.convert.facebookresearch import dit

FAMILIES: dict[str, ModuleType] = {
    "dit": dit,
}
