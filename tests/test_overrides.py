"""Dotted keys: flattened configs that compare, whichever of JSON and Python they come from."""

import json

from scaling.overrides import flat, override_flags, parse_overrides, tupled


def test_flat_keys() -> None:
    tree = {"a": {"b": [1, [2, 3]], "c": {"d": None}}, "e": "x", "f": {}}
    assert flat(tree) == {"a.b": (1, (2, 3)), "a.c.d": None, "e": "x"}
    assert flat(flat(tree)) == flat(tree)
    assert flat(json.loads(json.dumps({"a": {"b": (1, (2, 3))}}))) == flat({"a": {"b": (1, (2, 3))}})
    assert tupled([1, (2, [3])]) == (1, (2, (3,)))


def test_overrides_survive_the_command_line() -> None:
    values = {"a.b": 1, "a.c": "1", "a.d": (0.9, 0.99), "a.e": None, "a.f": "100 steps", "a.g": True}
    assert parse_overrides(override_flags(values)) == values
