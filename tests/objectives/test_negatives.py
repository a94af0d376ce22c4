"""Wrong captions: always another text, any with the same chance, or those like the right one."""

import jax
import jax.numpy as jnp
import numpy as np

from scaling.objectives.negatives import draw_others, shared_words
from tests.support.checks import KEY

TEXT = np.array([[1, 5], [1, 6], [1, 5], [2, 7], [3, 0]], np.int32)  # 0 and 2 are the same
REAL = np.ones(5, bool)


def drawn(count: int, real: np.ndarray = REAL, likeness: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Of 2,000 batches the indices [2000, 5, count], and which exist."""
    keys = jax.random.split(KEY, 2000)
    like = None if likeness is None else jnp.asarray(likeness, jnp.float32)
    found = jax.vmap(lambda key: draw_others(key, jnp.asarray(TEXT), jnp.asarray(real), count, like))(keys)
    return np.asarray(found[0]), np.asarray(found[1])


def test_a_wrong_caption_is_another_real_one_and_each_is_as_likely() -> None:
    index, exists = drawn(1, real=np.array([True, True, True, True, False]))
    assert exists.all()
    for row, others in enumerate([{1, 3}, {0, 2, 3}, {1, 3}, {0, 1, 2}, {0, 1, 2, 3}]):
        chosen, times = np.unique(index[:, row], return_counts=True)
        assert set(chosen.tolist()) == others
        np.testing.assert_allclose(times / 2000, 1 / len(others), atol=0.05)


def test_several_are_different_and_those_that_are_not_there_are_said_so() -> None:
    index, exists = drawn(4)
    counts = np.array([3, 4, 3, 4, 4])
    np.testing.assert_array_equal(exists, np.broadcast_to(np.arange(4) < counts[:, None], (2000, 5, 4)))
    for rows, there in zip(index[:50], exists[:50], strict=True):
        for row, (chosen, known) in enumerate(zip(rows, there, strict=True)):
            assert len(set(chosen[known])) == known.sum()
            assert all((TEXT[other] != TEXT[row]).any() for other in chosen[known])


def test_of_like_captions_each_is_drawn_in_proportion() -> None:
    likeness = np.zeros((5, 5))
    likeness[3, 1] = np.log(6.0)
    index, _ = drawn(1, likeness=likeness)
    times = np.bincount(index[:, 3, 0], minlength=5) / 2000
    np.testing.assert_allclose(times, np.array([1, 6, 1, 0, 1]) / 9, atol=0.04)


def test_shared_words_are_the_cosine_of_the_bags() -> None:
    text = np.array([[9, 1, 5, 6, 0], [9, 5, 5, 1, 0], [9, 2, 3, 0, 0], [9, 0, 0, 0, 0]], np.int32)
    word = np.array([[-1, 0, 1, 2, -1], [-1, 0, 1, 2, -1], [-1, 0, 1, -1, -1], [-1] * 5], np.int32)
    found = shared_words(jnp.asarray(text), jnp.asarray(word), 12)
    sets = [set(t[w >= 0].tolist()) for t, w in zip(text, word, strict=True)]
    expected = [[len(a & b) / np.sqrt(max(len(a), 1) * max(len(b), 1)) for b in sets] for a in sets]
    np.testing.assert_allclose(found, expected, atol=1e-6)
