"""Checkpoints in and out: a package an outside format, in it a file a family.

A family's file has `table(model)`, the rules between outside names and ours; for formats with a config.json
`config(model, inputs)`, which writes it, and `fields(config)`, what it says of the model in the names of our
fields; `IGNORED`, patterns of outside names that are no parameters; `RENAMED`, patterns of old names and what
they are today; and where the outside tensors can be of
another resolution `source(model, tensors)`, the model that they are of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from scaling.convert import diffusers, huggingface, microsoft, torchvision


@dataclass(frozen=True)
class Format:
    """An outside format: its families, and the name of its file of weights."""

    families: Mapping[str, ModuleType]
    file: str = "model"
    config_file: bool = True


FORMATS: dict[str, Format] = {
    "huggingface": Format(huggingface.FAMILIES),
    "diffusers": Format(diffusers.FAMILIES, file="diffusion_pytorch_model"),
    "torchvision": Format(torchvision.FAMILIES, config_file=False),
    "microsoft": Format(microsoft.FAMILIES, config_file=False),
}
