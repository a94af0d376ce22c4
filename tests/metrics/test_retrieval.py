import jax.numpy as jnp
import numpy as np
import pytest

from scaling.metrics.retrieval import clip_score, places, recalls


def test_places_against_sorting() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=(50, 30)).astype(np.float32), rng.integers(0, 30, size=50)
    order = np.argsort(-scores, axis=1)
    found = np.asarray(places(jnp.asarray(scores), jnp.asarray(right[:, None] == np.arange(30)[None])))
    assert [order[i, place] for i, place in enumerate(found)] == right.tolist()
    ten = recalls(found)
    assert ten == {f"r{k}": np.mean([right[i] in order[i, :k] for i in range(50)]) for k in (1, 5, 10)}


def test_equal_scores_find_nothing() -> None:
    found = np.asarray(places(jnp.zeros((4, 20)), jnp.eye(4, 20, dtype=bool)))
    assert found.tolist() == [19] * 4
    assert recalls(found) == {"r1": 0.0, "r5": 0.0, "r10": 0.0}


def test_the_best_of_several_counts_among_the_others() -> None:
    scores = jnp.asarray([[0.9, 0.8, 0.7, 0.6, 0.5]])
    for own, place in (([2, 4], 2), ([0, 1], 0), ([1, 2, 3, 4], 1)):
        assert places(scores, jnp.asarray([[i in own for i in range(5)]])).tolist() == [place]


def test_clip_score_is_of_the_cosine() -> None:
    image = jnp.asarray([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    text = jnp.asarray([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert clip_score(image, text).tolist() == pytest.approx([100.0, 60.0, 0.0])
