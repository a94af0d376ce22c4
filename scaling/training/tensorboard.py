"""Progress for a person to watch: a bar, or plain lines without a terminal, and TensorBoard files."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from clu import asynclib
from tqdm import tqdm

PLAIN_SECONDS = 10.0  # seconds between lines without a terminal


class Progress:
    """Loss, examples/s and time left: a tqdm bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, name: str, start: int, total: int, batch_size: int, show: bool = True) -> None:
        self.name, self.start, self.total, self.batch_size, self.show = name, start, total, batch_size, show
        self.started = self.last_line = time.monotonic()
        terminal = show and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", desc=name, disable=not terminal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def update(self, step: int, loss: float) -> None:
        now = time.monotonic()
        rate = (step - self.start) / max(now - self.started, 1e-9)
        if not self.bar.disable:
            self.bar.set_postfix_str(
                f"loss {loss:.4g}, {rate * self.batch_size:,.0f} examples/s", refresh=False
            )
            self.bar.update(step - self.bar.n)
        elif self.show and (now - self.last_line > PLAIN_SECONDS or step == self.total):
            self.last_line = now
            left = (self.total - step) / max(rate, 1e-9)
            print(
                f"{self.name}: step {step}/{self.total}, loss {loss:.4g}, "
                f"{rate * self.batch_size:,.0f} examples/s, {left:,.0f} s left",
                flush=True,
            )

    def say(self, text: str) -> None:
        if self.show:
            tqdm.write(f"{self.name}: {text}")
            sys.stdout.flush()


def _tensorboardx() -> Any:
    """Imports tensorboardX without PyTorch, which it would load if installed, taking 2 s."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX
    finally:
        if absent:
            del sys.modules["torch"]
    return tensorboardX


class ScalarWriter:
    """A writer of TensorBoard files of scalars, in a thread of its own (`clu.asynclib`).

    `clu.metric_writers` does the same through TensorFlow, which it imports; tensorboardX needs none.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = _tensorboardx().SummaryWriter(str(folder))
        self._pool = asynclib.Pool("tensorboard", max_workers=1)  # one thread keeps the order

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one value per name; an error of an earlier write is raised here."""

        def write() -> None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

        self._pool(write)()

    def close(self) -> None:
        """Waits for pending writes; an error of one of them is raised here."""
        try:
            self._pool.close()
        finally:
            self._writer.close()
