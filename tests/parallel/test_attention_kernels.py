"""Fused attention: when it is asked for, how it is asked, and what is done without it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec

from scaling.models import attention
from scaling.models.execution import EXECUTION, PLAIN, Execution
from scaling.parallel import attention_kernels, sharding, tracing
from scaling.parallel.mesh import Mesh

LONG = attention_kernels.LONG


@contextmanager
def allowed(kernel: Callable[..., jax.Array]) -> Iterator[None]:
    before = EXECUTION.set(Execution(attention=kernel))
    yield
    EXECUTION.reset(before)


def arrays(tokens: int, others: int, batch: int = 2, heads: int = 3) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, 8) for n in (tokens, others, others, tokens)]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def gradients(scale: float | None, *given: jax.Array) -> Any:
    """Of a weighed sum of attention, and that sum."""
    *qkv, weights = given

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (weights * attention.dot_product_attention(q, k, v, scale=scale)).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*qkv)


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


# cuDNN's


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of jax, which answers by plain attention in place of cuDNN's."""
    asked = []
    real = jax.nn.dot_product_attention

    @functools.wraps(real)
    def answer(*args: jax.Array, implementation: str, **options: object) -> jax.Array:
        asked.append(implementation)
        assert all(each.shape[1] % 2 == 0 for each in args)  # jax has no gradient for odd ones
        return real(*args, implementation="xla", **options)  # type: ignore[arg-type]

    monkeypatch.setattr("jax.nn.dot_product_attention", answer)
    return asked


@pytest.mark.parametrize(("tokens", "others"), [(6, 6), (5, 5), (5, 6), (6, 7)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_cudnn_is_asked_for_what_plain_attention_gives(
    asked: list[str], tokens: int, others: int, scale: float | None
) -> None:
    given = arrays(tokens, others)
    plain = gradients(scale, *given)
    assert not asked
    with allowed(attention_kernels.cudnn):
        found = gradients(scale, *given)
    assert asked == ["cudnn"]
    assert_close(found, plain)


def test_without_cudnn_attention_is_plain() -> None:
    """float32 is nothing that cuDNN has, be it installed or not."""
    q, k, v, _ = arrays(6, 6)
    plain = attention.dot_product_attention(q, k, v)
    with allowed(attention_kernels.cudnn):
        found = attention.dot_product_attention(q, k, v)
    np.testing.assert_array_equal(found, plain)


def traced_on(platform: str, capability: str = "") -> Callable[..., jax.Array]:
    mesh = SimpleNamespace(
        devices=np.array([SimpleNamespace(platform=platform, compute_capability=capability)], object),
        shape={"fsdp": 1},
        abstract_mesh=sharding.make_mesh(Mesh(), jax.devices()[:1]).abstract_mesh,
    )
    return tracing.trace_on_mesh(mesh, attention.dot_product_attention)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [("gpu", "9.0", ["cudnn"]), ("gpu", "7.5", []), ("gpu", "gfx942", []), ("cpu", "", []), ("tpu", "", [])],
)
def test_it_is_asked_for_on_gpus_and_never_with_a_bias(
    asked: list[str], platform: str, capability: str, expected: list[str]
) -> None:
    q, k, v, _ = arrays(6, 6)
    traced = traced_on(platform, capability)
    jax.eval_shape(traced, q, k, v)
    assert asked == expected
    jax.eval_shape(traced, q, k, v, jnp.zeros((1, 1, 6, 6)))
    assert asked == expected and EXECUTION.get() is PLAIN


# Splash attention, interpreted


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The heads of each kernel made, for few tokens too."""
    made = []
    real = splash_attention.make_splash_mha

    def make(mask: splash_attention.MultiHeadMask, **options: Any) -> Any:
        made.append(mask.shape[0])
        return real(mask=mask, **options, interpret=True)

    monkeypatch.setattr(splash_attention, "make_splash_mha", make)
    monkeypatch.setattr(attention_kernels, "LONG", 100)
    return made


@pytest.mark.parametrize(("tokens", "others"), [(256, 256), (300, 300), (256, 520), (300, 256)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_splash_gives_what_plain_attention_gives(
    runs: list[int], tokens: int, others: int, scale: float | None
) -> None:
    given = arrays(tokens, others, batch=1, heads=2)
    plain = gradients(scale, *given)
    assert not runs
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    with allowed(attention_kernels.splash), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = jax.jit(functools.partial(gradients, scale))(*given)
    assert runs == [2]
    assert_close(found, plain)


@pytest.mark.parametrize(("heads", "share"), [(4, 2), (3, 3)])
def test_a_chip_has_its_share_of_batch_and_heads(runs: list[int], heads: int, share: int) -> None:
    """data=2, fsdp=2, tensor=2; 3 heads are replicated on each."""
    given = arrays(130, 130, batch=4, heads=heads)
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(given, NamedSharding(mesh, PartitionSpec()))
    rules, shape = nn.logical_axis_rules(sharding.ACTIVATION_AXES), mesh.abstract_mesh
    with allowed(attention_kernels.splash), rules, jax.sharding.use_abstract_mesh(shape):
        found = jax.jit(functools.partial(gradients, None))(*placed)
    assert runs == [share]
    assert_close(found, gradients(None, *given))


@pytest.mark.parametrize(
    ("platform", "tokens", "width", "expected"),
    [("tpu", 1024, 128, [3]), ("tpu", 1023, 64, []), ("tpu", 1024, 192, []), ("cpu", 1024, 64, [])],
)
def test_it_is_for_many_tokens_on_tpus(
    runs: list[int],
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    tokens: int,
    width: int,
    expected: list[int],
) -> None:
    """And never for wide heads, nor with a bias."""
    monkeypatch.setattr(attention_kernels, "LONG", LONG)
    x, traced = jnp.ones((1, tokens, 3, width)), traced_on(platform)
    jax.eval_shape(traced, x, x, x)
    assert runs == expected
    jax.eval_shape(traced, x, x, x, jnp.zeros((1, 1, 1, tokens)))
    assert runs == expected


@pytest.mark.parametrize(
    ("tokens", "block"), [(256, 256), (1024, 1024), (1025, 384), (3137, 640), (4096, 1024)]
)
def test_blocks_pad_little(tokens: int, block: int) -> None:
    assert attention_kernels.block_of(tokens) == block
