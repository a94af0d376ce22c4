"""torchvision's state dicts."""

from types import ModuleType

from scaling.convert.torchvision import resnet

FAMILIES: dict[str, ModuleType] = {
    "resnet": resnet,
}
