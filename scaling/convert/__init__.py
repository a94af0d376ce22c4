"""Import and export of other libraries' checkpoints: a package per format, in it a file per model family.

A family's file has `table(model)`, the rules between the names of foreign tensors and paths in the model's
variables, and where needed
- `IGNORED`, patterns of names that are computed, not trained, and are not read, and `buffers(model, inputs)`,
  the tensors that an export adds to the table's: they are not trained, but a strict load needs them;
- `UNUSED`, patterns of names that belong to other heads; `BASE`, the prefix of names in a model with a head;
  `RENAMED`, for each version of the library the patterns of its names and their replacements in the table;
- `source(model, tensors, config)`, the model that the foreign tensors belong to, where its resolution may
  differ from that of `model`; `config` is the content of config.json, or None;
- `preprocessing(model)`, the usual preprocessing of images, for models of images in pixels.
A format with a config.json has `config(model, inputs)`, which writes it, and `fields(config)`, which returns
what it says of the model in the names of our fields, by a table `FIELDS` of the keys that are compared and of
those that cannot matter. `SETS` are fields that the file decides where a config leaves them open,
`notes(config)` returns the lines to report, and `check_inputs(config, inputs)` and `check_export(model)`
refuse what the other library would compute differently. `layouts` holds what several files share.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from scaling.convert import diffusers, facebookresearch, huggingface, microsoft, openai, timm, torchvision


@dataclass(frozen=True)
class Format:
    """A foreign format: its families, and the name of its weights file."""

    families: Mapping[str, ModuleType]
    file: str = "model"
    config_file: bool = True


FORMATS: dict[str, Format] = {
    "huggingface": Format(huggingface.FAMILIES),
    "diffusers": Format(diffusers.FAMILIES, file="diffusion_pytorch_model"),
    "timm": Format(timm.FAMILIES, config_file=False),
    "torchvision": Format(torchvision.FAMILIES, config_file=False),
    "microsoft": Format(microsoft.FAMILIES, config_file=False),
    "facebookresearch": Format(facebookresearch.FAMILIES, config_file=False),
    "openai": Format(openai.FAMILIES, config_file=False),
}
