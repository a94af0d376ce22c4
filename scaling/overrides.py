"""Dotted config keys: overrides such as `--config.optimizer.learning_rate=3e-4`, and flattened configs."""

import ast
from collections.abc import Iterable, Mapping
from typing import Any

from scaling.errors import UserError

FLAG = "--config."
# For the help of verbs that take overrides.
OVERRIDES = f"{FLAG}KEY=VALUE overrides any key of the config, e.g. {FLAG}optimizer.learning_rate=3e-4"


def parse_overrides(overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Returns `["a.b=1", ...]` as {"a.b": 1}. A value that is no Python literal is text; FLAG is optional.

    Raises:
        UserError: if an override has no key or no value.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    parsed = {}
    for text in overrides:
        key, equals, value = text.removeprefix(FLAG).partition("=")
        if not equals:
            raise UserError(f"{FLAG}{key}: needs a value, as in {FLAG}{key}=VALUE")
        if not all(key.split(".")):
            raise UserError(f"{FLAG}{key}: names no key; give it as {FLAG}SECTION.KEY=VALUE")
        parsed[key] = _literal(value)
    return parsed


def override_flags(overrides: Mapping[str, Any]) -> list[str]:
    """Returns overrides as flags; text that would be parsed as another value is quoted."""
    return [
        f"{FLAG}{key}={value if isinstance(value, str) and _literal(value) == value else repr(value)}"
        for key, value in overrides.items()
    ]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: brackets in brackets
        return text


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of a nested dict in place; sections that are missing are added."""
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens {"a": {"b": 1}} to {"a.b": 1}; lists become tuples, so that JSON and Python compare equal."""
    flattened: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = tupled(value)
    return flattened


def tupled(value: Any) -> Any:
    """Converts lists to tuples, at any depth."""
    return tuple(tupled(v) for v in value) if isinstance(value, list | tuple) else value
