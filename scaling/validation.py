"""Validation of values against the annotations of the dataclass that reads them."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from scaling.errors import UserError


def option_types(cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns option name -> annotation, for the fields of a dataclass that its constructor takes."""
    hints = typing.get_type_hints(cls)
    names = (f.name for f in dataclasses.fields(cls) if f.init)
    return {name: hints[name] for name in names if name not in skip}


def default_options(cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns option name -> default of a dataclass, nested for fields that are dataclasses."""
    defaults: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name in skip or not f.init:
            continue
        if dataclasses.is_dataclass(hints[f.name]):
            defaults[f.name] = default_options(typing.cast(type, hints[f.name]))
        elif f.default is not dataclasses.MISSING:
            defaults[f.name] = _plain(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            defaults[f.name] = f.default_factory()
    return defaults


def _plain(default: Any) -> Any:
    """Returns a default as a config would give it: objects as the fields that have no default value."""
    if isinstance(default, tuple):
        return tuple(_plain(each) for each in default)
    if dataclasses.is_dataclass(default):
        values = {f.name: (getattr(default, f.name), f.default) for f in dataclasses.fields(default)}
        return {name: value for name, (value, usual) in values.items() if value != usual}
    return default


def parse_dataclass(cls: type, values: Mapping[str, Any], section: str) -> Any:
    """Returns `cls(**values)` with every value checked against its annotation.

    Raises:
        UserError: if a key is unknown or missing, or a value is not allowed; the message names the key.
    """
    options = parse_options(option_types(cls), values, section)
    try:
        return cls(**options)
    except UserError as e:
        raise UserError(f"{section}.{e}") from None
    except TypeError:
        absent = set(option_types(cls)) - set(options) - set(default_options(cls))
        raise UserError(f"{section}.{min(absent)}: needs a value") from None


def parse_options(hints: Mapping[str, Any], values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Returns the values, each checked against its annotation in `hints`.

    Raises:
        UserError: if a key is unknown, or a value is not allowed.
    """
    for key in values:
        if key not in hints:
            raise UserError(unknown_key_message(f"{section}.{key}", [f"{section}.{k}" for k in hints]))
    return {key: check_value(value, hints[key], f"{section}.{key}") for key, value in values.items()}


def check_value(value: Any, hint: Any, key: str) -> Any:
    """Returns the value as its annotation's type (an int as a float, a list as a tuple).

    Raises:
        UserError: if it is of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return parse_dataclass(typing.cast(type, hint), value, key)
    if origin is dict and isinstance(value, Mapping):
        return {name: check_value(inner, args[1], f"{key}.{name}") for name, inner in value.items()}
    if origin is Literal and value in args:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return check_value(value, option, key)
            except UserError:
                continue
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if args[1:] == (Ellipsis,) else list(args)
        if len(inner) == len(value):
            return tuple(
                check_value(v, h, f"{key}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True))
            )
    if hint is type(None) and value is None:
        return None
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise UserError(f"{key}={value!r}: must be {_describe(hint)}")


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is tuple:
        return "a tuple of " + ", ".join("..." if a is Ellipsis else _describe(a) for a in args)
    if dataclasses.is_dataclass(hint):
        return "a dict of " + ", ".join(f.name for f in dataclasses.fields(hint))
    names = {int: "an integer", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def unknown_key_message(key: str, known: Iterable[str]) -> str:
    """Returns the message for an unknown key: the nearest known one, and all keys of its section."""
    matches = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {matches[0]}?" if matches else ""
    section = key.rpartition(".")[0]
    names = sorted(k.removeprefix(f"{section}.") for k in known if k.rpartition(".")[0] == section)
    return f"{key}: no such key{hint}" + (f" ({section} has {', '.join(names)})" if names else "")
