"""timm's state dicts, as of its version 0.9."""

from types import ModuleType

from scaling.convert.timm import swin, vit

FAMILIES: dict[str, ModuleType] = {
    "swin": swin,
    "vit": vit,
}
