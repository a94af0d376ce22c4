"""Microsoft's original state dicts."""

from types import ModuleType

from scaling.convert.microsoft import swin

FAMILIES: dict[str, ModuleType] = {
    "swin": swin,
}
