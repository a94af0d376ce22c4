"""How a model is executed where it is traced: the switches that depend on the device and the mesh.

Models know neither. `parallel.tracing` sets all of them at once; by default a model is plain arithmetic,
which has both modes of differentiation and can be counted.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Execution:
    """The switches of one trace; each is off by default."""

    # Function by which a layer gathers its sharded weights before it uses them, `f(weights, path, depth,
    # dtype)`. `path` and `depth` are those of the stack that the weights are a slice of, `dtype` is the
    # arithmetic's.
    gather: Callable[[Any, str, int, Any], Any] | None = None

    # Attention as one kernel, which never writes q k^T to memory: `f(q, k, v, scale)` raises
    # NotImplementedError for inputs that it does not support. A kernel has no forward-mode derivative, and
    # its cost cannot be counted.
    attention: Callable[..., jax.Array] | None = None

    # Whether the gradient of a kernel is contracted as x^T g. Autodiff's own form, (g^T x)^T, gives the same
    # numbers at half the rate on XLA's CPU. The custom backward pass has no forward-mode derivative.
    row_major: bool = False

    # Whether convolutional blocks are unrolled whatever their model says. XLA's CPU compiler brings
    # convolutions into the form that its fast code needs only outside of loops: ResNet-50's step takes 15
    # times as long inside of them.
    unrolled: bool = False


PLAIN = Execution()
EXECUTION: ContextVar[Execution] = ContextVar("EXECUTION", default=PLAIN)
