"""The run folder: what is in it, who may write it, and how it stays whole.

`config.json`, `metrics.jsonl`, `status.json`, `checkpoints/`, `samples/`; `broken/`, once a checkpoint was
damaged. A line of metrics is an event; one of training has the seconds that the loop waited for batches since
the last one, `input_wait`. The status names the newest step that was `saved`, even if its checkpoint is lost.
One writer at a time, by a lock that dies with its process. Of several processes only the first writes.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from scaling.errors import UserError
from scaling.files import read_json, write_atomic, write_json

HEARTBEAT_SECONDS = 10.0


class RunFolder:
    """The writer's end of a run folder. Use as a context: enter locks it, leave says how it ended."""

    def __init__(self, path: Path | str, writer: bool = True) -> None:
        self.path, self.writer = Path(path), writer
        self.step, self.steps = 0, 0
        self.started = time.monotonic()
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._stop = threading.Event()
        self._writing = threading.Lock()  # held to write status.json, for the heartbeat is another thread
        self._saved: int | None = None
        self._beat: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not self.writer:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("w")
        except OSError as e:
            raise UserError(
                f"workdir={self.path}: cannot be written ({e.strerror}); choose another folder"
            ) from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(
                f"workdir={self.path}: another process is writing this run; wait for it or stop it"
            ) from None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        if self._metrics is not None:
            self._metrics.close()
        if self._lock is not None:
            self._lock.close()

    # --- status ---

    def begin(self, step: int, steps: int) -> None:
        """From here on `status.json` says running, with a heartbeat from a thread."""
        self.step, self.steps = step, steps
        if not self.writer:
            return
        self.status("running")
        self._beat = threading.Thread(target=self._heartbeat, daemon=True)
        self._beat.start()

    def _heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self.beat()

    def beat(self) -> None:
        """Writes that the run is running, at which step, and which step is saved."""
        with contextlib.suppress(UserError):  # a full disk is reported by the writes that matter
            self.status("running")

    def end(self, status: str, reason: str | None = None) -> None:
        """Stops the heartbeat and writes the last status: done, interrupted or failed (with the reason)."""
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        if self.writer:
            self.status(status, reason)

    def status(self, status: str, reason: str | None = None) -> None:
        """Writes `status.json`, from the process that writes; raises UserError if it cannot be written."""
        if not self.writer:
            return
        with self._writing:
            with contextlib.suppress(UserError):  # else what was known before
                self.saved()
            write_json(
                self.path / "status.json",
                {
                    "status": status,
                    "step": self.step,
                    "steps": self.steps,
                    "saved": self._saved,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "heartbeat": time.time(),
                    "reason": reason,
                },
            )

    def saved(self) -> int | None:
        """Returns the newest step that the folder has, or says it had, a checkpoint of; None if of no step.

        Raises:
            UserError: if `checkpoints/` cannot be listed, or is empty while `status.json` is not JSON.
        """
        kept = steps_in(self.path / "checkpoints")
        self._saved = kept[-1] if kept else self._said_to_be_saved()
        return self._saved

    def _said_to_be_saved(self) -> int | None:
        said = read_json(self.path / "status.json") or {}
        if said.get("saved") is not None:
            return int(said["saved"])
        if "saved" not in said:  # a folder older than this key
            told = said.get("status") == "interrupted" and said.get("reason") and said["step"] > 0
            if said.get("status") == "done" or told:
                return int(said["step"])
        return max(steps_in(self.path / "broken"), default=None)

    # --- metrics ---

    def open_metrics(self, step: int) -> None:
        """Opens `metrics.jsonl` for a run at `step`: later lines and a torn last one are dropped.

        The clock goes on from the last line that is kept.
        """
        if not self.writer:
            return
        kept = [e for e in read_events(self.path) if e["step"] <= step]
        text = "".join(json.dumps(e) + "\n" for e in kept)
        write_atomic(self.path / "metrics.jsonl", text)
        self._metrics = (self.path / "metrics.jsonl").open("a")
        self.started = time.monotonic() - max((e["wall"] for e in kept), default=0.0)

    def event(self, event: str, step: int, examples: int, values: Mapping[str, float], **more: Any) -> None:
        """Appends one line and hands it to the operating system."""
        if self._metrics is None:
            return
        wall = round(time.monotonic() - self.started, 3)
        line = {
            "event": event,
            "step": step,
            "examples": examples,
            "wall": wall,
            "values": dict(values),
        } | more
        try:
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
        except OSError as e:
            raise UserError(
                f"{self.path}/metrics.jsonl: cannot be written ({e.strerror}); free space, then resume"
            ) from e


def steps_in(folder: Path) -> list[int]:
    """Returns the steps with a checkpoint in the folder, in order; one still being written is not named so.

    Raises:
        UserError: if the folder cannot be listed.
    """
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(
            f"{folder}: cannot be listed ({e.strerror}); give access to it, then try again"
        ) from e
    return sorted(int(name) for name in names if name.isdecimal())


def read_events(path: Path | str) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`, in order; a torn line ends them."""
    events = []
    file = Path(path) / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events
