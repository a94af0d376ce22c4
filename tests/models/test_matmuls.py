"""The linear layers' product: both forms of its gradient agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.models import layers
from scaling.models.execution import EXECUTION, Execution
from scaling.models.matmuls import dot_general
from scaling.parallel import sharding, tracing
from scaling.parallel.mesh import Mesh


@pytest.mark.parametrize(("x", "kernel", "k"), [
    ((2, 5, 6), (6, 4), 1), ((2, 5, 6), (6, 2, 3), 1), ((2, 5, 2, 3), (2, 3, 7), 2), ((3, 6), (6, 4), 1),
])  # fmt: skip
def test_gradients_by_rows_are_autodiffs(x: tuple[int, ...], kernel: tuple[int, ...], k: int) -> None:
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x, kernel)]
    dims = ((tuple(range(len(x) - k, len(x))), tuple(range(k))), ((), ()))
    weights = jnp.asarray(rng.normal(size=(*x[: len(x) - k], *kernel[k:])), jnp.float32)

    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        return (weights * dot_general(a, b, dims) ** 2).sum()

    expected = jax.value_and_grad(loss, argnums=(0, 1))(*args)
    before = EXECUTION.set(Execution(row_major=True))
    found = jax.value_and_grad(loss, argnums=(0, 1))(*args)
    EXECUTION.reset(before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_steps_on_cpus_take_the_rows_form_and_models_alone_do_not() -> None:
    """A model by itself stays differentiable in forward mode; what is compiled for a CPU has its own rule."""
    block, x = layers.Mlp(8), jnp.ones((2, 3, 4))
    params = block.init(jax.random.key(0), x)

    def loss(params: object) -> jax.Array:
        return block.apply(params, x).sum()  # type: ignore[union-attr]

    _, tangent = jax.jvp(loss, (params,), (params,))
    assert np.isfinite(tangent)
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    assert "custom_vjp" in str(jax.make_jaxpr(tracing.trace_on_mesh(mesh, loss))(params))
    assert "custom_vjp" not in str(jax.make_jaxpr(loss)(params))
