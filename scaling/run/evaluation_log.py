"""The log of a process that evaluates a run beside its training: `evaluations.jsonl`, with its own lock."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from scaling.errors import UserError
from scaling.files import open_locked
from scaling.run.folder import EVALUATIONS, append_event, open_events, read_events


class EvaluationLog:
    """The writer of `evaluations.jsonl`. Use it as a context manager, which admits one writer at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVALUATIONS
        self._lock: IO[str] | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._lock = open_locked(self.path.with_suffix(".lock"))
        except BlockingIOError:
            raise UserError(
                f"run={self.path.parent}: another process is evaluating it; wait for it or stop it"
            ) from None
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); give access to it") from e
        self._file = open_events(self.path, self.events())  # without a torn last line
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()

    def events(self) -> list[dict[str, Any]]:
        """Returns the events that are in the file."""
        return read_events(self.path.parent, EVALUATIONS)

    def append(self, step: int, evaluator: str, values: Mapping[str, float]) -> None:
        """Appends the values of an evaluator at a step."""
        assert self._file is not None
        line = {"event": "evaluate", "step": step, "evaluator": evaluator, "values": dict(values)}
        append_event(self._file, line)
