"""What a person watches: a progress bar (or plain lines, where no terminal is) and TensorBoard files."""

import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

PLAIN_SECONDS = 10.0  # between lines where no terminal is


class Progress:
    """Loss, examples/s and time left: a tqdm bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, name: str, start: int, total: int, batch_size: int, show: bool = True) -> None:
        self.name, self.start, self.total, self.batch_size, self.show = name, start, total, batch_size, show
        self.since = self.said = time.monotonic()
        terminal = show and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", desc=name, disable=not terminal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def update(self, step: int, loss: float) -> None:
        now = time.monotonic()
        rate = (step - self.start) / max(now - self.since, 1e-9)
        if not self.bar.disable:
            self.bar.set_postfix_str(
                f"loss {loss:.4g}, {rate * self.batch_size:,.0f} examples/s", refresh=False
            )
            self.bar.update(step - self.bar.n)
        elif self.show and (now - self.said > PLAIN_SECONDS or step == self.total):
            self.said = now
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
    """The module, without PyTorch, which it would import where that is installed, taking 2 s."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX
    finally:
        if absent:
            del sys.modules["torch"]
    return tensorboardX


class _SummaryWriter:
    """clu's SummaryWriter interface on tensorboardX: scalars, which is what these runs write."""

    def __init__(self, log_dir: str) -> None:
        self.writer = _tensorboardx().SummaryWriter(log_dir)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, float(value), step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def metric_writer(folder: Path) -> Any:
    """clu's asynchronous metric writer for TensorBoard, without TensorFlow.

    `clu.metric_writers` imports TensorFlow in one place only, its `summary_writer` module, so a module
    of that name on tensorboardX stands in for it.
    """
    name = "clu.metric_writers.summary_writer"
    if name not in sys.modules:
        stand_in = types.ModuleType(name)
        stand_in.SummaryWriter = _SummaryWriter  # type: ignore[attr-defined]
        sys.modules[name] = stand_in
    from clu import metric_writers

    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))
