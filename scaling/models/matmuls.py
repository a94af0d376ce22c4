"""The matmul of activations with a kernel, with two forms of its gradient."""

import math
from typing import Any

import jax
from jax import lax

from scaling.models.execution import EXECUTION

Dims = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def dot_general(x: jax.Array, kernel: jax.Array, dims: Dims, precision: Any = None) -> jax.Array:
    """Contracts the last axes of x [..., K] with the first of a kernel [K, ...], as linear layers do.

    The signature is that of `lax.dot_general`, which `nn.Dense` takes.
    `precision` matters on TPUs and GPUs only: CPUs have a single one.
    """
    k = len(dims[0][0])
    if not EXECUTION.get().row_major:
        return lax.dot_general(x, kernel, dims, precision)
    assert dims == ((tuple(range(x.ndim - k, x.ndim)), tuple(range(k))), ((), ()))
    return _matmul(x, kernel, k)


def _forward(x: jax.Array, kernel: jax.Array, k: int) -> jax.Array:
    rows, width = x.shape[: x.ndim - k], math.prod(kernel.shape[:k])
    y = x.reshape(-1, width) @ kernel.reshape(width, -1)
    return y.reshape(*rows, *kernel.shape[k:])


def _backward(k: int, residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    width = math.prod(kernel.shape[:k])
    x2, kernel2 = x.reshape(-1, width), kernel.reshape(width, -1)
    g2 = g.reshape(len(x2), -1)
    dx = lax.dot_general(g2, kernel2, (((1,), (1,)), ((), ())))
    dkernel = lax.dot_general(x2, g2, (((0,), (0,)), ((), ())))
    return dx.reshape(x.shape), dkernel.reshape(kernel.shape)


_matmul = jax.custom_vjp(_forward, nondiff_argnums=(2,))
_matmul.defvjp(lambda x, kernel, k: (_forward(x, kernel, k), (x, kernel)), _backward)
