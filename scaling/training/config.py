"""Config files: `ml_collections` in the file, checked and frozen dataclasses in the package.

A config file has `get_config(variant) -> ConfigDict` with the sections of `run.options.Config`, and
`--config.optimizer.learning_rate=3e-4` overrides any key that exists.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scaling import evaluators
from scaling.errors import UserError
from scaling.former_names import require_current
from scaling.overrides import flat, parse_overrides, set_key
from scaling.python_files import call, load_module
from scaling.run import config as run_config
from scaling.run.options import Config
from scaling.validation import unknown_key_message


def load(source: str, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Loads the config of `FILE.py` or `FILE.py:ARGUMENT`, with overrides, and checks every key.

    Args:
        source: the file, and the argument for its `get_config`.
        overrides: `["optimizer.learning_rate=3e-4", ...]`, or a dict of dotted names.

    Raises:
        UserError: for a key that does not exist or a value that is not allowed; it names both.
    """
    config = complete(_read(source))
    keys = flat(config).keys()
    for key, value in parse_overrides(overrides).items():
        require_current([key])
        if key not in keys and not re.fullmatch(r"helpers\.[A-Za-z]\w*", key):  # a helper has any name
            raise UserError(unknown_key_message(key, keys))
        set_key(config, key, value)
    checked = run_config.from_dict(config)
    evaluators.make(checked.evaluators)  # checks their options
    return checked


def load_dict(source: str, overrides: Iterable[str] | Mapping[str, Any] = ()) -> dict[str, Any]:
    """Loads a config as `load` does, as plain nested dicts with every default filled in."""
    return dict(load(source, overrides).raw)


def complete(partial: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with every key that exists, as `run.config.complete`, also of its evaluators."""
    config = run_config.complete(partial)
    for name, options in config["evaluators"].items():
        defaults = evaluators.defaults(name, options.get("name"))
        config["evaluators"][name] = run_config.merged({"name": None, **defaults}, options)
    return config


def _read(source: str) -> dict[str, Any]:
    path, _, argument = source.partition(":")
    try:
        there = bool(path) and Path(path).exists()
    except OSError:  # no file can have such a name
        there = False
    if not there:
        raise UserError(f"config={path}: no such file (a config is FILE.py or FILE.py:VARIANT)")
    module = load_module(Path(path), "config")
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"config={path}: has no get_config(variant) that returns a ConfigDict")
    config = call(Path(path), get_config, *([argument] if argument else []))
    if not isinstance(config, ConfigDict):
        raise UserError(f"config={path}: get_config returned {type(config).__name__}, not a ConfigDict")
    values: dict[str, Any] = call(Path(path), config.to_dict)
    return values
