"""How the benchmarks take times and write them."""

import statistics
import time
from collections.abc import Callable, Iterable


def timed(run: Callable[[int], object], count: int) -> float:
    """Seconds of one step of `run(steps)`, the mean of so many."""
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def spread(values: Iterable[float], unit: float = 1.0, form: str = "{:,.0f}") -> str:
    """The median, and the least and most, each times `unit`."""
    found = [unit * each for each in values]
    low, middle, high = map(form.format, (min(found), statistics.median(found), max(found)))
    return f"{middle} ({low} to {high})"
