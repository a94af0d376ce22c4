"""Checkpoints in and out: a package an outside format, in it a file a family.

A family's file has `table(model)`, the rules between outside names and ours, and where there is need
- `IGNORED`, patterns of outside names that are computed and not read, and `buffers(model, inputs)`, what an
  export adds to the table's tensors: those that are not trained, but must be there for a strict load;
- `UNUSED`, patterns of names that other heads have; `BASE`, what the names of a model with a head begin with;
  `RENAMED`, by version the patterns of its names and what stands for them in the table;
- `source(model, tensors, config)`, the model that the outside tensors are of, where that can be one for
  another resolution than `model`; `config` is that of config.json, or None;
- `preprocessing(model)`, how the weights usually see images, where they are of images in pixels.
A format with a config.json has `config(model, inputs)`, which writes it, and `fields(config)`, what it says
of the model in the names of our fields, by a table `FIELDS` of what is compared and what cannot matter.
`SETS` are fields that the file decides where a config leaves them open, `notes(config)` what is to be said,
`check_inputs(config, inputs)` and `check_export(model)` refuse what the other side would compute otherwise.
What several files share is in `layouts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from scaling.convert import diffusers, facebookresearch, huggingface, microsoft, openai, timm, torchvision


@dataclass(frozen=True)
class Format:
    """An outside format: its families, and the name of its file of weights."""

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
