"""Attention as a GPU's kernel: when it is asked for, how it is asked, and what is done without it."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.engine import sharding, tracing
from scaling.engine.config import Mesh
from scaling.models import attention


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of jax, which answers by plain products in place of cuDNN's."""
    asked = []
    real = jax.nn.dot_product_attention

    @functools.wraps(real)
    def answer(*args: jax.Array, implementation: str, **options: object) -> jax.Array:
        asked.append(implementation)
        assert all(each.shape[1] % 2 == 0 for each in args)  # jax has no gradient for odd ones
        return real(*args, implementation="xla", **options)  # type: ignore[arg-type]

    monkeypatch.setattr("jax.nn.dot_product_attention", answer)
    return asked


def arrays(tokens: int, others: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = [(2, tokens, 3, 8), (2, others, 3, 8), (2, others, 3, 8), (2, tokens, 3, 8)]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize(("tokens", "others"), [(6, 6), (5, 5), (5, 6), (6, 7)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_the_kernel_is_asked_for_what_plain_products_give(
    fused: list[str], tokens: int, others: int, scale: float | None
) -> None:
    *qkv, weights = arrays(tokens, others)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (weights * attention.dot_product_attention(q, k, v, scale=scale)).sum()

    plain = jax.value_and_grad(loss, argnums=(0, 1, 2))(*qkv)
    assert not fused
    allowed = attention.CUDNN.set(True)
    found = jax.value_and_grad(loss, argnums=(0, 1, 2))(*qkv)
    attention.CUDNN.reset(allowed)
    assert fused == ["cudnn"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, plain)


def test_without_the_kernel_products_are_plain() -> None:
    """float32 is nothing that cuDNN has, be it installed or not."""
    q, k, v, _ = arrays(6, 6)
    plain = attention.dot_product_attention(q, k, v)
    allowed = attention.CUDNN.set(True)
    found = attention.dot_product_attention(q, k, v)
    attention.CUDNN.reset(allowed)
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize(
    ("platform", "capability", "asked"),
    [("gpu", "9.0", ["cudnn"]), ("gpu", "7.5", []), ("gpu", "gfx942", []), ("cpu", "", []), ("tpu", "", [])],
)
def test_it_is_asked_for_on_gpus_and_never_with_a_bias(
    fused: list[str], platform: str, capability: str, asked: list[str]
) -> None:
    q, k, v, _ = arrays(6, 6)
    mesh = SimpleNamespace(
        devices=np.array([SimpleNamespace(platform=platform, compute_capability=capability)], object),
        shape={"fsdp": 1},
        abstract_mesh=sharding.make_mesh(Mesh(), jax.devices()[:1]).abstract_mesh,
    )
    traced = tracing.on(mesh, attention.dot_product_attention)  # type: ignore[arg-type]
    jax.eval_shape(traced, q, k, v)
    assert fused == asked
    jax.eval_shape(traced, q, k, v, jnp.zeros((1, 1, 6, 6)))
    assert fused == asked and not attention.CUDNN.get()
