"""The machine's matmul rate: square matrices, in whichever of XLA and PyTorch is faster at it."""

from collections.abc import Callable

import jax
import torch
from timing import timed

SIZE = 2048 if jax.default_backend() == "cpu" else 8192
FLOPS = 2.0 * SIZE**3


def step(dtype: str) -> Callable[[int], float]:
    """`run(steps)`: one matmul per step, the result of the last waited for."""
    square = jax.numpy.ones((SIZE, SIZE), dtype)
    times = jax.jit(lambda a: a @ a)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = torch.ones((SIZE, SIZE), dtype=getattr(torch, dtype), device=device)

    def xla(steps: int) -> float:
        for _ in range(steps):
            out = times(square)
        return float(out[0, 0])

    def pytorch(steps: int) -> float:
        for _ in range(steps):
            out = theirs @ theirs
        return float(out[0, 0])

    def seconds(run: Callable[[int], float]) -> float:
        run(2)
        return timed(run, 10)

    return min(xla, pytorch, key=seconds)
