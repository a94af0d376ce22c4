"""The type of a converter: how checkpoints of one format are read and written for one family of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import flax.linen as nn
import numpy as np

from scaling.convert.preprocessing import Seen
from scaling.convert.rules import Rules, Tensors

M = TypeVar("M", bound=nn.Module)
Content = Mapping[str, Any]  # the content of a config.json
Inputs = Mapping[str, Any]  # a model's arguments by name


def _the_model_itself(model: M, tensors: Tensors, content: Content | None) -> M:
    return model


def _no_buffers(model: nn.Module, inputs: Inputs) -> dict[str, np.ndarray]:
    return {}


def _every_model(model: nn.Module) -> None:
    return None


def _all_inputs(content: Content, inputs: Inputs) -> None:
    return None


def _no_notes(content: Content) -> list[str]:
    return []


@dataclass(frozen=True, kw_only=True)
class ConfigFile(Generic[M]):
    """How a format's config.json is written and read."""

    # `config(model, inputs)` -> the content, for a model with these inputs.
    config: Callable[[M, Inputs], dict[str, Any]]

    # `fields(content)` -> what the content says of the model, in the names of the model's fields.
    fields: Callable[[Content], dict[str, Any]]

    sets: tuple[str, ...] = ()  # fields of the model that the file decides where a config leaves them open
    notes: Callable[[Content], list[str]] = _no_notes  # -> lines to report about the content

    # `check_inputs(content, inputs)` refuses inputs for which the other library would compute something else.
    check_inputs: Callable[[Content, Inputs], None] = _all_inputs


@dataclass(frozen=True, kw_only=True)
class Converter(Generic[M]):
    """How a format's checkpoints are read and written for the models of one family.

    Patterns are regular expressions that are searched in the names of tensors.
    """

    table: Callable[[M], Rules]  # the rules between foreign tensors and paths in the model's variables
    config_file: ConfigFile[M] | None = None  # None in formats without a config.json

    ignored: tuple[str, ...] = ()  # patterns of tensors that are computed, not trained, and are not read
    unused: tuple[str, ...] = ()  # patterns of tensors of other heads, which are left out and reported
    base: str = ""  # prefix that the names have in a model with a head

    # For each version of the library, the patterns of its names and their replacements in the table.
    renamed: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    # `source(model, tensors, content)` -> the model that the tensors belong to, where its resolution may
    # differ from that of `model`; without config.json, `content` is None.
    source: Callable[[M, Tensors, Content | None], M] = _the_model_itself

    # `buffers(model, inputs)` -> the tensors that an export adds to the table's: they are not trained, but a
    # strict load needs them.
    buffers: Callable[[M, Inputs], dict[str, np.ndarray]] = _no_buffers

    # `check_export(model)` refuses models that the other library would compute differently.
    check_export: Callable[[M], None] = _every_model

    # `preprocessing(model)` -> the usual preprocessing of images; None for models without images in pixels.
    preprocessing: Callable[[M], Seen] | None = None
