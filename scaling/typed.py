"""Values checked against the annotations of the dataclass that reads them."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from scaling.errors import UserError


def options_of(cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Option name -> annotation of a dataclass."""
    hints = typing.get_type_hints(cls)
    names = (f.name for f in dataclasses.fields(cls) if f.init)
    return {name: hints[name] for name in names if name not in skip}


def defaults_of(cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    made: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name in skip or not f.init:
            continue
        if dataclasses.is_dataclass(hints[f.name]):
            made[f.name] = defaults_of(typing.cast(type, hints[f.name]))
        elif f.default is not dataclasses.MISSING:
            made[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            made[f.name] = f.default_factory()
    return made


def typed(cls: type, values: Mapping[str, Any], section: str) -> Any:
    """`cls(**values)` with every value checked against its annotation; errors name the section's key."""
    options = typed_options(options_of(cls), values, section)
    try:
        return cls(**options)
    except UserError as e:
        raise UserError(f"{section}.{e}") from None
    except TypeError:
        absent = set(options_of(cls)) - set(options) - set(defaults_of(cls))
        raise UserError(f"{section}.{min(absent)}: needs a value") from None


def typed_options(hints: Mapping[str, Any], values: Mapping[str, Any], section: str) -> dict[str, Any]:
    for key in values:
        if key not in hints:
            raise UserError(unknown(f"{section}.{key}", [f"{section}.{k}" for k in hints]))
    return {key: checked(value, hints[key], f"{section}.{key}") for key, value in values.items()}


def checked(value: Any, hint: Any, key: str) -> Any:
    """The value as the annotation has it (an int where a float is wanted, a list for a tuple)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return typed(typing.cast(type, hint), value, key)
    if origin is dict and isinstance(value, Mapping):
        return {name: checked(inner, args[1], f"{key}.{name}") for name, inner in value.items()}
    if origin is Literal and value in args:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return checked(value, option, key)
            except UserError:
                continue
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if args[1:] == (Ellipsis,) else list(args)
        if len(inner) == len(value):
            return tuple(
                checked(v, h, f"{key}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True))
            )
    if hint is type(None) and value is None:
        return None
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise UserError(f"{key}={value!r}: must be {_said(hint)}")


def _said(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_said(a) for a in args)
    if origin is tuple:
        return "a tuple of " + ", ".join("..." if a is Ellipsis else _said(a) for a in args)
    names = {int: "an integer", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    section = key.rpartition(".")[0]
    names = sorted(k.removeprefix(f"{section}.") for k in known if k.rpartition(".")[0] == section)
    return f"{key}: no such key{hint}" + (f" ({section} has {', '.join(names)})" if names else "")
