import jax.numpy as jnp
import numpy as np

from scaling.metrics.accuracy import topk_hits


def test_hits_against_sorting() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 10)).astype(np.float32), rng.integers(0, 10, size=200)
    order = np.argsort(-logits, axis=1)
    for k in (1, 5):
        found = topk_hits(jnp.asarray(logits), jnp.asarray(labels, jnp.int32), k)
        np.testing.assert_array_equal(found, (order[:, :k] == labels[:, None]).any(axis=1))


def test_a_constant_classifier_scores_by_class_order() -> None:
    labels = jnp.arange(10)
    assert topk_hits(jnp.zeros((10, 10)), labels, 1).tolist() == [1.0] + [0.0] * 9
    assert topk_hits(jnp.zeros((10, 10)), labels, 5).sum() == 5.0


def test_every_example_is_a_hit_with_fewer_classes_than_k() -> None:
    assert topk_hits(jnp.zeros((3, 3)), jnp.arange(3), 5).tolist() == [1.0, 1.0, 1.0]
