"""Validation of values against the annotations of the dataclass that reads them."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from scaling.errors import UserError

LONGEST = 120  # characters of a value in an error
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # of int32 and float32, which numbers become on a device
# Names that other programs give to keys, with ours.
OTHER_NAMES = {
    "accuracy": "top1", "base_lr": "learning_rate", "beta1": "b1", "beta2": "b2", "bs": "batch_size",
    "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "classes": "num_classes",
    "clip": "grad_clip_norm",
    "clip_norm": "grad_clip_norm", "epochs": "duration", "epsilon": "eps", "grad_clip": "grad_clip_norm",
    "init_lr": "learning_rate", "label_dropout": "condition_dropout", "lr": "learning_rate",
    "lr_schedule": "schedule", "max_grad_norm": "grad_clip_norm", "max_steps": "duration", "momentum": "b1",
    "num_epochs": "duration", "num_layers": "depth", "num_heads": "heads", "num_steps": "duration",
    "num_workers": "workers", "patch_size": "patch", "path": "data_dir", "root": "data_dir",
    "scheduler": "schedule", "total_steps": "duration", "warmup_steps": "warmup", "wd": "weight_decay",
}  # fmt: skip


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
        if not absent:
            raise
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
    _require_in_range(value, key)
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
    raise UserError(f"{key}={shown(value)}: must be {_describe(hint)}")


def check_stored(path: object, values: Mapping[str, Any], hints: Mapping[str, Any], advice: str) -> None:
    """Checks the values that a file holds against the types that they must have.

    Raises:
        UserError: if one is missing or of another type; the message names the file, and ends with `advice`.
    """
    for key, hint in hints.items():
        try:
            check_value(values.get(key), hint, key)
        except UserError as e:
            raise UserError(f"{path}: {e}; {advice}") from None


def _require_in_range(value: Any, key: str) -> None:
    """Checks that a number is finite, and not too large for the 32 bits that it has on a device."""
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        raise UserError(f"{key}={value!r}: must be a finite number, of at most {LARGEST_FLOAT:g}")
    if isinstance(value, int) and not abs(value) <= LARGEST_INT:
        raise UserError(f"{key}={shown(value)}: must be in (-2^31, 2^31)")


def shown(value: Any) -> str:
    """Returns a value as errors print it, without the middle of a long one."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"


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


def in_section(section: str, error: UserError, keys: Iterable[str]) -> UserError:
    """Returns the error with `section` in front, if its message begins with one of the section's `keys`."""
    begin = re.match(r"(\w+)(?=[=:.])", str(error))
    return UserError(f"{section}.{error}") if begin and begin[1] in set(keys) else error


def unknown_key_message(key: str, known: Iterable[str]) -> str:
    """Returns the message for an unknown key: the nearest known one, and all keys of its section."""
    known = sorted(known)
    within = [k for k in known if k.startswith(f"{key}.")]
    if within:
        return f"{key}: is a section, not a key; give one of its keys, such as {within[0]}"
    section, _, name = key.rpartition(".")
    sections = {k.rpartition(".")[0] for k in known}
    nearest = difflib.get_close_matches(section, sections, n=1)
    section = section if section in sections else next(iter(nearest), section)
    names = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    matches = _nearest(name, names)
    full = [f"{section}.{match}".removeprefix(".") for match in matches]
    if not matches:  # the key of another section may have that name
        full = [k for k in known if k.rpartition(".")[2] in (name, OTHER_NAMES.get(name))][:1]
    hint = f"; did you mean {full[0]}?" if full else ""
    return f"{key}: no such key{hint}" + (f" ({section} has {', '.join(names)})" if section and names else "")


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    """Returns the name that `name` stands for in other programs, or the most similar one, if there is any."""
    names = list(names)
    other = OTHER_NAMES.get(name)
    if other in names:
        return [str(other)]
    begun = [each for each in names if len(name) > 2 and each.startswith(name)]
    return difflib.get_close_matches(name, names, n=1) or begun[:1]
