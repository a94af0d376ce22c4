"""Values and keys of configs: ranges of numbers, and the name that an unknown key is answered with."""

import pytest

from scaling.errors import UserError
from scaling.validation import check_value, shown, unknown_key_message

KNOWN = (
    "optimizer.learning_rate", "optimizer.eps", "optimizer.b2", "optimizer.grad_clip_norm", "train.duration",
    "model.num_classes", "data.batch_size",
)  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, 2**31, -(2**31), 10**400])
@pytest.mark.parametrize("hint", [float, int, float | None, tuple[float, ...]])
def test_numbers_are_finite_and_fit_32_bits(value: float, hint: object) -> None:
    given = (value,) if hint == tuple[float, ...] else value
    with pytest.raises(UserError, match=r"^a\.b(\[0\])?=.*must be"):
        check_value(given, hint, "a.b")


def test_the_largest_numbers_are_taken() -> None:
    assert check_value(2**31 - 1, int, "a") == 2**31 - 1
    assert check_value(-3e38, float, "a") == -3e38


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("optimizr.clip", "optimizer.grad_clip_norm"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("train.epochs", "train.duration"),
        ("data.num_classes", "model.num_classes"),
        ("data.batchsize", "data.batch_size"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(key: str, nearest: str) -> None:
    assert unknown_key_message(key, KNOWN).startswith(f"{key}: no such key; did you mean {nearest}?")


def test_an_unknown_key_like_no_other_is_answered_with_its_section() -> None:
    said = unknown_key_message("train.zzz", KNOWN)
    assert said == "train.zzz: no such key (train has duration)"
    assert unknown_key_message("train", KNOWN).startswith("train: is a section")


def test_long_values_are_shortened() -> None:
    assert len(shown("x" * 1000)) < 150 and shown(3) == "3"
