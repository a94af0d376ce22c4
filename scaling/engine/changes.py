"""One config from another: with other values for some keys, from an older run, and how two differ."""

import copy
from collections.abc import Mapping
from typing import Any

from scaling.data.transforms import FORMER
from scaling.engine.config import Config, complete, flat, from_dict


def changed(cfg: Config, values: Mapping[str, Any]) -> Config:
    """Returns the config with other values for some dotted keys, checked whole."""
    raw = copy.deepcopy(dict(cfg.raw))
    for key, value in values.items():
        *sections, last = key.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return from_dict(raw)


def stored(described: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config in a run's config.json, complete: an older one lacks keys, and has older names."""
    return complete(_renamed(described["config"]))


def _renamed(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _renamed(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_renamed(value) for value in tree]
    return FORMER.get(tree, tree) if isinstance(tree, str) else tree


def differences(old: Config, new: Config) -> dict[str, Any]:
    """Returns {dotted key: [old value, new value]} of two configs with the same keys."""
    before, after = flat(old.raw), flat(new.raw)
    keys = sorted(before.keys() | after.keys())
    return {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}
