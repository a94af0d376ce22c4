"""What is hidden: whole words in the right share, BERT's three fates, colours of patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.objectives.masking import corrupted, mean_colours, own_draw, picked, whole_words
from tests.support.checks import KEY


def words(rows: int, length: int = 24) -> np.ndarray:
    """Captions of 0 to 12 words of one to three tokens, int32 [rows, length]; [CLS] first, -1."""
    rng, made = np.random.default_rng(0), np.full((rows, length), -1, np.int32)
    for row in made:
        count = int(rng.integers(0, 13))
        ids = np.repeat(np.arange(count), rng.integers(1, 4, count))[: length - 2]
        row[1 : 1 + len(ids)] = ids
    return made


def test_whole_words_are_hidden_and_the_right_share_of_them() -> None:
    word = words(200)
    draw = jax.random.uniform(KEY, word.shape)
    hide = np.asarray(whole_words(draw, jnp.asarray(word), 0.15))
    for row, hidden in zip(word, hide, strict=True):
        count = row.max() + 1
        chosen = [w for w in range(count) if hidden[row == w].any()]
        assert all(hidden[row == w].all() for w in chosen)  # no word in part
        assert len(chosen) == (max(1, round(0.15 * count)) if count else 0)
        assert not hidden[row < 0].any()
    assert {round(0.15 * (row.max() + 1)) for row in word} == {0, 1, 2}


def test_every_word_is_hidden_as_often_as_another() -> None:
    draw = jax.random.uniform(KEY, (4000, 5))
    hide = picked(draw, jnp.full(4000, 5), 0.4)
    np.testing.assert_array_equal(hide.sum(axis=1), 2)
    np.testing.assert_allclose(hide.mean(axis=0), 0.4, atol=0.03)


def test_hidden_tokens_become_the_mask_any_token_or_stay() -> None:
    text = jnp.full((200, 100), 7, jnp.int32)
    hide = jax.random.uniform(KEY, text.shape) < 0.5
    seen = np.asarray(corrupted(jax.random.key(1), text, hide, mask=1000, vocabulary=500))
    hidden = seen[np.asarray(hide)]
    np.testing.assert_array_equal(seen[~np.asarray(hide)], 7)
    assert np.mean(hidden == 1000) == pytest.approx(0.8, abs=0.01)
    assert np.mean(hidden == 7) == pytest.approx(0.1, abs=0.01)
    others = hidden[(hidden != 7) & (hidden != 1000)]
    assert len(others) / len(hidden) == pytest.approx(0.1, abs=0.01)
    assert others.max() < 500 and len(np.unique(others)) > 300


def test_a_captions_own_numbers_are_its_own() -> None:
    text = jax.random.randint(KEY, (6, 9), 0, 30)
    draw = np.asarray(own_draw(text, "words", 9))
    order = np.array([3, 1, 5])
    np.testing.assert_array_equal(own_draw(text[order], "words", 9), draw[order])
    assert len(np.unique(draw)) == draw.size  # no caption, and no place, has another's
    assert (np.asarray(own_draw(text, "patches", 9)) != draw).all()
    swapped = np.asarray(own_draw(text[:, ::-1], "words", 9))
    assert (swapped != draw).all()  # the order of words counts


def test_mean_colours_are_those_of_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3))
    found = mean_colours(jnp.asarray(pixels / 127.5 - 1.0, jnp.float32), patch=2)
    assert found.shape == (2, 6, 3) and found.dtype == jnp.int32
    for row in range(2):
        for col in range(3):
            square = pixels[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            assert np.abs(np.asarray(found)[:, 3 * row + col] - square.mean(axis=(1, 2))).max() <= 0.51
    white = mean_colours(jnp.ones((1, 2, 2, 1)), patch=2)
    assert white.item() == 255
