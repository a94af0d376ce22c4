"""A job: one run to be trained, and what its folder says about it."""

import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.processes import lives
from scaling.run.folder import read_events, read_status

BEAT_SECONDS = 60.0  # age below which a heartbeat is that of a living process


@dataclass(frozen=True)
class Job:
    """One run to be trained: its folder and its command."""

    name: str
    folder: Path
    config: str
    flags: Sequence[str]
    evaluators: frozenset[str] = frozenset()  # names of those that measure the run at its last step

    @property
    def log(self) -> Path:
        """The file that the command's output is appended to."""
        return self.folder / "log.txt"

    def arguments(self) -> list[str]:
        """Returns the arguments of `scaling` that train the run, or resume it."""
        return ["train", f"--config={self.config}", *self.flags, "--workdir", str(self.folder)]

    def command(self) -> list[str]:
        """Returns the command that trains the run in a process of its own."""
        return [sys.executable, "-m", "scaling", *self.arguments()]

    def status(self) -> dict[str, Any]:
        """Returns the run folder's `status.json`, or {} if it has none that can be read."""
        try:
            return read_status(self.folder) or {}
        except UserError:
            return {}  # as if the run had never started; the trainer says what is wrong

    def done(self) -> bool:
        """Returns whether the run is done, and every evaluator has measured its last step.

        One that was added later has not: the trainer then measures the run, and trains no further.
        """
        status = self.status()
        if status.get("status") != "done":
            return False
        try:
            events = [event for event in read_events(self.folder) if event["event"] == "evaluate"]
        except UserError:
            return False  # the trainer says what is wrong
        last = {event.get("evaluator") for event in events if event["step"] == status["step"]}
        return self.evaluators <= last

    def fraction(self) -> float:
        """Returns how much of the run is trained, from 0 to 1."""
        status = self.status()
        return status["step"] / status["steps"] if status.get("steps") else 0.0

    def trained_by(self) -> int | None:
        """Returns the process that is training the run now (0 if it is on another host), or None."""
        status = self.status()
        if status.get("status") != "running" or time.time() - status["heartbeat"] > BEAT_SECONDS:
            return None
        if status.get("host") != socket.gethostname():
            return 0
        pid = int(status.get("pid", 0))
        return pid if lives(pid, status.get("pid_started")) else None
