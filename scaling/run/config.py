"""Configs as nested dicts: completed, checked and typed, changed, compared, and read back from a run.

A key that a config leaves out takes the default of the dataclass that reads it, so every key that exists can
be overridden, and a key that nothing reads is an error.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from scaling.data import Data
from scaling.errors import UserError
from scaling.former_names import renamed, require_current
from scaling.models import MODELS
from scaling.objectives import GIVEN, OBJECTIVES, trains
from scaling.overrides import flat, set_key
from scaling.parallel.mesh import Mesh
from scaling.preprocessing import Preprocessing
from scaling.run.options import Checkpoint, Config, Named, Optimizer, Train
from scaling.sampling import Sampling
from scaling.validation import (
    check_value,
    default_options,
    option_types,
    parse_dataclass,
    parse_options,
    shown,
    unknown_key_message,
)

SECTIONS: dict[str, type] = {
    "data": Data,
    "preprocessing": Preprocessing,
    "optimizer": Optimizer,
    "mesh": Mesh,
    "train": Train,
    "sampling": Sampling,
    "checkpoint": Checkpoint,
}


def _look_up(table: Mapping[str, Any], section: str, key: str, value: object) -> Any:
    if not isinstance(value, str) or value not in table:
        raise UserError(f"{section}.{key}={shown(value)}: must be one of {', '.join(sorted(table))}")
    return table[str(value)]


def _model_options(family: object) -> dict[str, Any]:
    module = _look_up(MODELS, "model", "name", family).module
    return option_types(module, skip=("parent", "name"))  # fields that flax adds


def _objective_class(name: object) -> type:
    return _look_up(OBJECTIVES, "objective", "name", name)


def complete(partial: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with every key that exists: keys that `partial` leaves out take their defaults.

    Evaluators stay as they are in `partial`. A model's fields default to None, which means the variant's
    value (or, for the number of classes and the resolution, the data's).

    Raises:
        UserError: for a key that does not exist, an older name of a key, or a section that is missing or
            no section.
    """
    _require_sections(partial)
    require_current([*flat(partial), *partial])  # a section that is empty has no flat key
    names = [f.name for f in dataclasses.fields(Config) if f.name != "raw"]
    for key in partial:
        if key not in names:
            raise UserError(unknown_key_message(key, names))
    for key in ("model", "objective"):
        if not partial.get(key):
            raise UserError(f"{key}: the config has no such section")
    config: dict[str, Any] = {name: _plain(partial.get(name, {})) for name in names}
    model, objective = config["model"], config["objective"]
    config["model"] = {
        "name": None, "variant": None, **dict.fromkeys(_model_options(model.get("name"))), **model
    }  # fmt: skip
    objective_class = _objective_class(objective.get("name"))
    if not config["data"] and trains(objective["name"]):
        raise UserError("data: the config has no such section")
    config["objective"] = {"name": None, **default_options(objective_class, skip=GIVEN), **objective}
    for section, cls in SECTIONS.items():
        config[section] = merged(default_options(cls), config[section])
    return config


def _require_sections(partial: Mapping[str, Any]) -> None:
    """Checks that keys are text, and that a config's sections, and its evaluators, have keys."""
    for key, section in partial.items():
        if not isinstance(section, Mapping):
            raise UserError(f"{key}={shown(section)}: must be a section, with keys of its own")
        for name, value in section.items():
            if not isinstance(name, str):
                raise UserError(f"{key}.{shown(name)}: is no key; keys are text")
            if key in ("evaluators", "evaluate") and not isinstance(value, Mapping):
                raise UserError(f"{key}.{name}={shown(value)}: must be a section, with keys of its own")


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base`, changed in place, with the values of `over` at any depth."""
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        base[key] = merged(base[key], value) if nested else value
    return base


def from_dict(config: Mapping[str, Any]) -> Config:
    """Returns a complete config as frozen, typed sections.

    Raises:
        UserError: at the first key that is wrong.
    """
    model = dict(config["model"])
    family, variant = model.pop("name"), model.pop("variant")
    set_options = {k: v for k, v in model.items() if v is not None}
    options = parse_options(_model_options(family), set_options, "model")
    sections: dict[str, Any] = {"model": Named(family, options, check_value(variant, str, "model.variant"))}

    objective = dict(config["objective"])
    objective_class = _objective_class(objective.pop("name"))
    hints = option_types(objective_class, skip=GIVEN)
    sections["objective"] = Named(config["objective"]["name"], parse_options(hints, objective, "objective"))

    for section, cls in SECTIONS.items():
        sections[section] = parse_dataclass(cls, config[section], section)
    sections["evaluators"] = {
        name: Named(options.get("name"), {k: v for k, v in options.items() if k != "name"})
        for name, options in config["evaluators"].items()
    }
    sections["helpers"] = {
        name: _check_folder(folder, f"helpers.{name}") for name, folder in config["helpers"].items()
    }
    return Config(**sections, raw=config)


def _check_folder(value: object, key: str) -> str:
    folder: str = check_value(value, str, key)
    if not folder.strip():
        raise UserError(f"{key}={folder!r}: must be the folder of a run")
    return folder


# --- flat keys, changes and comparisons ---


def changed(cfg: Config, values: Mapping[str, Any]) -> Config:
    """Returns the config with other values for some dotted keys, every key checked again."""
    raw = copy.deepcopy(dict(cfg.raw))
    for key, value in values.items():
        set_key(raw, key, value)
    return from_dict(raw)


def stored(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the complete config of a run's config.json, which may lack newer keys and have older names."""
    return complete(renamed(description["config"]))


def differences(old: Config, new: Config) -> dict[str, Any]:
    """Returns {dotted key: [old value, new value]} of two configs with the same keys."""
    before, after = flat(old.raw), flat(new.raw)
    keys = sorted(before.keys() | after.keys())
    return {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}
