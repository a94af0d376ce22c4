"""Import and export of other libraries' checkpoints: a package per format, in it a file per model family.

A family's file describes its `Converter` (`scaling.convert.converter`): the rules between the names of
foreign tensors and paths in the model's variables, and what else the format needs. `layouts` holds what
several files share.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scaling.convert import diffusers, facebookresearch, huggingface, microsoft, openai, timm, torchvision
from scaling.convert.converter import Converter


@dataclass(frozen=True)
class Format:
    """A foreign format: its converters by family, and the name of its weights file."""

    families: Mapping[str, Converter[Any]]
    file: str = "model"


FORMATS: dict[str, Format] = {
    "huggingface": Format(huggingface.FAMILIES),
    "diffusers": Format(diffusers.FAMILIES, file="diffusion_pytorch_model"),
    "timm": Format(timm.FAMILIES),
    "torchvision": Format(torchvision.FAMILIES),
    "microsoft": Format(microsoft.FAMILIES),
    "facebookresearch": Format(facebookresearch.FAMILIES),
    "openai": Format(openai.FAMILIES),
}
