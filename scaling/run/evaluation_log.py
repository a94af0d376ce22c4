"""The log of a process that evaluates a run beside its training: `evaluations.jsonl`, with its own lock."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from scaling.errors import UserError
from scaling.files import write_atomic
from scaling.run.folder import EVALUATIONS, read_events


class EvaluationLog:
    """The writer of `evaluations.jsonl`. Use it as a context manager, which admits one writer at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVALUATIONS
        self._lock: IO[str] | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._lock = self.path.with_suffix(".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__(None, None, None)
            raise UserError(
                f"run={self.path.parent}: another process is evaluating it; wait or stop it"
            ) from None
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); give access to it") from e
        events = self.events()  # without a torn last line
        write_atomic(self.path, "".join(json.dumps(event) + "\n" for event in events))
        self._file = self.path.open("a")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()

    def events(self) -> list[dict[str, Any]]:
        """Returns the events that are in the file."""
        return read_events(self.path.parent, EVALUATIONS)

    def append(self, step: int, evaluator: str, values: Mapping[str, float]) -> None:
        """Appends the values of an evaluator at a step.

        Raises:
            UserError: if they cannot be written.
        """
        assert self._file is not None
        line = {"event": "evaluate", "step": step, "evaluator": evaluator, "values": dict(values)}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); free space, then resume") from e
