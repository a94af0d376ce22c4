"""Tables of names: every shape goes over and back to the same bits, and what does not fit is said."""

from typing import Any

import numpy as np
import pytest

from scaling.convert import rules
from scaling.convert.rules import ConversionRule

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "theirs", "ours"),
    [
        (rules.SAME, (3, 4), [(3, 4)]),
        (rules.TRANSPOSED, (3, 4), [(4, 3)]),
        (rules.LEADING, (1, 3, 4), [(3, 4)]),
        (rules.CONVOLUTION, (5, 4, 3, 2), [(3, 2, 4, 5)]),
        (rules.CONVOLUTION, (5, 4, 3, 2, 1), [(3, 2, 1, 4, 5)]),
        (rules.patches(2, 3), (5, 4, 2, 3), [(24, 5)]),
        (rules.split_heads(2), (6, 5), [(5, 2, 3)]),
        (rules.split_heads(2), (6,), [(2, 3)]),
        (rules.split_heads(2, 3), (18, 5), [(5, 2, 3)] * 3),
        (rules.split_heads(2, 3), (18,), [(2, 3)] * 3),
        (rules.merged_heads(2), (5, 6), [(2, 3, 5)]),
    ],
)
def test_shapes_go_over_and_back(shape: rules.Shape, theirs: Any, ours: Any) -> None:
    tensor = random(*theirs)
    parts = shape.load(tensor)
    assert [part.shape for part in parts] == ours
    np.testing.assert_array_equal(shape.save(*parts), tensor)


def test_heads_are_consecutive_rows_of_the_fused_kernel() -> None:
    fused, x = random(12, 4), random(4)  # query and key, two heads of width 3
    query, key = rules.split_heads(2, 2).load(fused)
    np.testing.assert_allclose(np.einsum("d,dhw->hw", x, query).ravel(), fused[:6] @ x, rtol=1e-6)
    np.testing.assert_allclose(np.einsum("d,dhw->hw", x, key).ravel(), fused[6:] @ x, rtol=1e-6)


TABLE = [
    *rules.linear("layers.{i}.fc", "blocks/fc", range(2)),
    ConversionRule("table", ("params/table",), rules.SAME, copies=("other.table",)),
]


def tensors() -> dict[str, np.ndarray]:
    made = {f"layers.{i}.fc.weight": random(3, 4) for i in range(2)}
    made |= {f"layers.{i}.fc.bias": random(3) for i in range(2)}
    return made | dict.fromkeys(("table", "other.table"), random(5))


def test_layers_are_stacked_and_copies_written_again() -> None:
    given = tensors()
    variables = rules.load(TABLE, given)
    assert variables["params"]["blocks"]["fc"]["kernel"].shape == (2, 4, 3)
    np.testing.assert_array_equal(variables["params"]["blocks"]["fc"]["bias"][1], given["layers.1.fc.bias"])
    back = rules.save(TABLE, variables)
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(back[name], tensor)
    assert rules.faults(TABLE, given, variables, ()) == []


def test_every_fault_is_named() -> None:
    given = tensors()
    variables = rules.load(TABLE, given)
    del given["layers.1.fc.bias"]
    given["layers.0.fc.weight"] = random(4, 4)
    given["other.table"] = given["other.table"] + 1
    given |= {"head.weight": random(2), "position_ids": np.arange(3)}
    assert rules.faults(TABLE, given, variables, ("^position_ids$",)) == [
        "missing layers.1.fc.bias",
        "unexpected head.weight",
        "layers.0.fc.weight has shape (4, 4), not (3, 4)",
        "other.table differs from table, of which it must be a copy",
    ]
    given["layers.0.fc.weight"] = random(12)  # of another rank
    assert "layers.0.fc.weight has shape (12,), not (3, 4)" in rules.faults(TABLE, given, variables, ())
    given["layers.0.fc.weight"] = np.ones((3, 4), np.int8)
    assert "layers.0.fc.weight is of int8, not of a float" in rules.faults(TABLE, given, variables, ())


@pytest.mark.parametrize(
    ("shape", "ours", "given"),
    [
        (rules.LEADING, [(3,)], (2, 3)),
        (rules.CONVOLUTION, [(3, 3, 4, 8)], (5,)),
        (rules.patches(2, 2), [(12, 8)], (5,)),
        (rules.merged_heads(2), [(2, 3, 8)], ()),
        (rules.split_heads(2), [(4, 2, 3)], ()),
        (rules.split_heads(2, 3), [(4, 2, 2)] * 3, (8, 4)),
        (rules.split_heads(2), [(2, 3)], (3, 1, 2)),
        (rules.reshaped((-1,), (1, -1)), [(1, 6)], (2, 3)),
        (rules.LEADING, [(3, 2)], (1, 3, 2, 1)),
    ],
)
def test_a_tensor_of_another_rank_or_number_is_a_fault(shape: rules.Shape, ours: Any, given: Any) -> None:
    parts = {f"part{i}": np.zeros(each, np.float32) for i, each in enumerate(ours)}
    table = [ConversionRule("one", tuple(f"params/{name}" for name in parts), shape)]
    found = rules.faults(table, {"one": np.zeros(given, np.float32)}, {"params": parts}, ())
    assert len(found) == 1
    assert found[0].startswith(f"one has shape {given}, not ")
