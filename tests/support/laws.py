"""Values of laws that are known."""

import numpy as np

from scaling.laws import Values


def values_of(x: np.ndarray, y: np.ndarray, noise: float = 0.0, seeds: int = 1, rng: int = 0) -> Values:
    """Returns values of `seeds` runs at each x [N] around y [N], with log-normal noise."""
    drawn = y[:, None] * np.exp(noise * np.random.default_rng(rng).normal(size=(len(x), seeds)))
    points = tuple(str(i) for i in range(len(x)) for _ in range(seeds))
    runs = tuple(str(i) for i in range(drawn.size))
    return Values(("x",), np.repeat(x, seeds)[:, None], drawn.ravel(), points, runs, np.zeros(drawn.size))
