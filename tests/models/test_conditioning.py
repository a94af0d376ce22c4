"""Conditions: those of a class, and what holds of any pytree of arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.errors import UserError
from scaling.models import dit
from scaling.models.conditioning import ClassLabel, conditioning_of, dropped, interleaved
from scaling.training.evaluate import named_arrays

PAIR: Any = {
    "tokens": jnp.arange(12, dtype=jnp.int32).reshape(3, 4),
    "pooled": jnp.ones((3, 2)),
}


def test_a_class_is_the_condition_of_a_model_that_says_nothing_else() -> None:
    conditioning = conditioning_of(dit.make("A/14", num_classes=7))
    assert conditioning == ClassLabel(7)
    labels = jnp.asarray([3, 0], jnp.int32)
    assert conditioning.of({"label": labels, "image": jnp.zeros((2, 4, 4, 1))}, {}) is labels
    null = conditioning.null(labels)
    assert null.tolist() == [7, 7] and null.dtype == labels.dtype
    with pytest.raises(UserError, match=r"^data: have no labels, and the model is conditioned on a class"):
        conditioning.of({"image": labels}, {})


def test_examples_are_dropped_whole() -> None:
    null = jax.tree.map(lambda x: -jnp.ones_like(x), PAIR)
    found = dropped(PAIR, null, jnp.asarray([False, True, False]))
    np.testing.assert_array_equal(found["tokens"][1], [-1] * 4)
    np.testing.assert_array_equal(found["pooled"][:, 0], [1, -1, 1])
    np.testing.assert_array_equal(found["tokens"][::2], PAIR["tokens"][::2])
    assert found["tokens"].dtype == jnp.int32


def test_each_examples_own_condition_stands_before_its_null_one() -> None:
    found = interleaved(PAIR, jax.tree.map(jnp.zeros_like, PAIR))
    np.testing.assert_array_equal(found["tokens"][0::2], PAIR["tokens"])
    assert not found["tokens"][1::2].any() and found["pooled"].shape == (6, 2)


def test_arrays_have_the_names_of_their_paths() -> None:
    assert named_arrays(jnp.zeros(3)).keys() == {"labels"}
    assert named_arrays({"text": PAIR}).keys() == {"text/pooled", "text/tokens"}
