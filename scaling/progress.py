"""Progress for a person to watch: a bar on a terminal, elsewhere a line now and then."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines where there is no terminal to draw a bar on

T = TypeVar("T")


class Progress:
    """How much of a total is done, how fast, and the time left. Use it as a context manager.

    With `examples` per unit, the examples per second are shown. Without `show` it is silent.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "step",
        start: float = 0,
        examples: int = 0,
        show: bool = True,
    ) -> None:
        self.name, self.total, self.unit, self.examples, self.show = name, total, unit, examples, show
        self.done = start
        self.first: tuple[float, float] | None = None  # what was done at the first update, and its time
        self.last_line = time.monotonic()
        terminal = show and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.bar = tqdm(total=total, initial=start, unit=unit, desc=name, disable=not terminal, leave=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.bar.close()

    def update(self, done: float, note: str = "", last: bool = False) -> None:
        """Shows that so much is done, with a note beside it; the `last` line is written at any rate."""
        self.done, now = done, time.monotonic()
        if self.first is None:
            self.first = done, now
        rate = (done - self.first[0]) / max(now - self.first[1], 1e-9)
        texts = [note] if note else []
        if self.examples and rate:
            texts.append(f"{rate * self.examples:,.0f} examples/s")
        if not self.bar.disable:
            self.bar.set_postfix_str(", ".join(texts), refresh=False)
            self.bar.update(round(done, 1) - self.bar.n)
        elif self.show and (last or now - self.last_line > LINE_SECONDS):
            texts += [f"{(self.total - done) / rate:,.0f} s left"] if rate else []
            self.last_line = now
            text = ", ".join([f"{self.unit} {round(done, 1)}/{self.total}", *texts])
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        """Shows that so many more are done."""
        self.update(self.done + count)

    def say(self, text: str) -> None:
        """Writes a line of its own, above the bar if there is one."""
        if self.show:
            say(f"{self.name}: {text}")


def say(text: str) -> None:
    """Writes a line to stdout at once, above any bar."""
    tqdm.write(text)
    sys.stdout.flush()


def track(
    items: Iterable[T], name: str, total: int, unit: str = "batch", examples: int = 0, show: bool = True
) -> Iterator[T]:
    """Yields the items, and shows how many of `total` are done with."""
    with Progress(name, total, unit, examples=examples, show=show) as progress:
        for item in items:
            yield item
            progress.advance(1)
