"""The run folder: what is in it, who may write it, and how it stays consistent.

It holds `config.json`, `metrics.jsonl`, `status.json`, `checkpoints/` and `samples/`, `broken/` once a
checkpoint was damaged, and `evaluations.jsonl` if the run was measured beside its training. Each line of
metrics is an event; a training event has `input_wait`, the seconds that the loop waited for batches since the
one before, and `in_steps`, the seconds that it spent in training steps: with that wait, and without
evaluations, saves, and the first step, which compiles. Its `examples_per_second` is over that time.

The status names the newest step that was `saved`, even if its checkpoint is lost, and the process by its
number and its start, because numbers are given again. A lock, which is released when its process dies, admits
one writer at a time. Of several processes only the first writes.
"""

import contextlib
import functools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from scaling.errors import UserError
from scaling.files import (
    open_locked,
    read_json,
    with_checksum,
    without_checksum,
    write_all,
    write_atomic,
    write_json,
)
from scaling.processes import start_time
from scaling.validation import check_value, shown

HEARTBEAT_SECONDS = 10.0  # between two writes of `status.json`
METRICS = "metrics.jsonl"  # file of what training has logged and measured
EVALUATIONS = "evaluations.jsonl"  # file of what other processes than training's have measured
SECTIONS = (
    "config",
    "data",
    "fingerprint",
    "model",
    "cost",
    "helpers",
    "imported",
)  # objects in `config.json`
STATUS: dict[str, Any] = {  # types of the values in `status.json`
    "status": Literal["running", "interrupted", "done", "failed", "importing"], "step": int, "steps": int,
    "saved": int | None, "host": str, "pid": int, "pid_started": int | None, "heartbeat": float,
    "reason": str | None,
}  # fmt: skip
# Keys that may differ when a run is resumed: they change what is measured or where, not what is learned.
MAY_DIFFER = (
    "mesh.", "evaluators.", "sampling.", "checkpoint.", "train.log_every", "data.threads", "data.workers",
    "data.prefetch", "model.remat", "model.unroll",
)  # fmt: skip
COST = ("params", "gmacs", "tokens", "train_flops_per_step")  # numbers in its `cost`
MEND = "put the file back, or choose another folder"
log = logging.getLogger(__name__)


class RunFolder:
    """The writer of a run folder. Use it as a context manager, which locks the folder."""

    def __init__(self, path: Path | str, writer: bool = True) -> None:
        self.path, self.writer = Path(path), writer
        self.step, self.steps = 0, 0
        self.started = time.monotonic()
        self._lock: IO[str] | None = None
        self._metrics: IO[bytes] | None = None
        self._stop = threading.Event()
        self._writing = threading.Lock()  # held to write status.json: the heartbeat is another thread
        self._saved: int | None = None
        self._beat: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not self.writer:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open_locked(self.path / "lock")
        except BlockingIOError:
            raise UserError(
                f"workdir={self.path}: another process is writing this run; wait for it or stop it"
            ) from None
        except OSError as e:
            raise UserError(
                f"workdir={self.path}: cannot be written ({e.strerror}); choose another folder"
            ) from e
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
        """Writes the status "running" from now on, with a heartbeat from a thread."""
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
        """Writes the status "running", the step that the run is at, and the step that is saved."""
        with contextlib.suppress(UserError):  # a full disk is reported by the writes that matter
            self.status("running")

    def end(self, status: str, reason: str | None = None) -> None:
        """Stops the heartbeat and writes the final status: done, interrupted or failed (with the reason)."""
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        if self.writer:
            self.status(status, reason)

    def status(self, status: str, reason: str | None = None) -> None:
        """Writes `status.json`, if this process is the writer.

        Raises:
            UserError: if it cannot be written.
        """
        if not self.writer:
            return
        with self._writing:
            with contextlib.suppress(UserError):  # the newest step known before stays
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
                    "pid_started": start_time(os.getpid()),
                    "heartbeat": time.time(),
                    "reason": reason,
                },
            )

    def saved(self) -> int | None:
        """Returns the newest step that has a checkpoint, or had one according to the folder; else None.

        Raises:
            UserError: if `checkpoints/` cannot be listed, or is empty while `status.json` is not JSON.
        """
        steps = steps_in(self.path / "checkpoints")
        self._saved = steps[-1] if steps else self._recorded_step()
        return self._saved

    def _recorded_step(self) -> int | None:
        """Returns the newest step that was saved according to `status.json` or `broken/`."""
        status = read_status(self.path) or {}
        if status.get("saved") is not None:
            return int(status["saved"])
        if "saved" not in status:  # a folder older than this key
            signalled = status.get("status") == "interrupted" and status.get("reason") and status["step"] > 0
            if status and (status["status"] == "done" or signalled):
                return int(status["step"])
        return max(steps_in(self.path / "broken"), default=None)

    # --- metrics ---

    def open_metrics(self, step: int) -> None:
        """Opens `metrics.jsonl` for a run at `step`: later lines, and a torn last line, are dropped.

        The clock continues from the last line that is kept.
        """
        if not self.writer:
            return
        events = [e for e in read_events(self.path) if e["step"] <= step]
        self._metrics = open_events(self.path / METRICS, events)
        self.started = time.monotonic() - max((e.get("wall", 0.0) for e in events), default=0.0)

    def event(self, event: str, step: int, examples: int, values: Mapping[str, float], **more: Any) -> None:
        """Appends one line of metrics and hands it to the operating system.

        Raises:
            UserError: if it cannot be written.
        """
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
        append_event(self._metrics, line)


def steps_in(folder: Path) -> list[int]:
    """Returns the steps with a checkpoint in the folder, in order, without one that is being written.

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


def read_evaluations(path: Path | str) -> dict[int, dict[str, float]]:
    """Returns the evaluated values of a run by step, of training and of processes beside it."""
    steps: dict[int, dict[str, float]] = {}
    for event in [*read_events(path), *read_events(path, EVALUATIONS)]:
        if event["event"] == "evaluate":
            steps.setdefault(event["step"], {}).update(event.get("values", {}))
    return dict(sorted(steps.items()))


def open_events(path: Path, events: Iterable[Mapping[str, Any]]) -> IO[bytes]:
    """Opens a file of events to append to, which holds these and no more.

    Raises:
        UserError: if it cannot be written.
    """
    write_atomic(path, "".join(json.dumps(with_checksum(event)) + "\n" for event in events))
    try:
        return path.open("ab", buffering=0)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); give access to it, then resume") from e


def append_event(file: IO[bytes], event: Mapping[str, Any]) -> None:
    """Appends a line and hands it to the operating system.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        write_all(file, (json.dumps(with_checksum(event)) + "\n").encode())
    except OSError as e:
        raise UserError(f"{file.name}: cannot be written ({e.strerror}); free space, then resume") from e


def read_events(path: Path | str, name: str = METRICS) -> list[dict[str, Any]]:
    """Returns the events of a run's file, in order.

    A line that is no event loses that line alone, and the log says so. Only the last line may be torn unsaid.

    Raises:
        UserError: if the file cannot be read.
    """
    file = Path(path) / name
    try:
        *lines, last = file.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); give access to it") from None
    events = [_parse_event(line) for line in lines if line.strip()]
    if bad := [i for i, event in enumerate(events, 1) if event is None]:
        _say_once(f"{file}: {len(bad)} of {len(events)} lines are no events, and are left out: {bad[:5]}")
    return [event for event in (*events, _parse_event(last)) if event is not None]


def _parse_event(line: bytes) -> dict[str, Any] | None:
    """Returns the event in a line; None if there is none, or its values have other types than events have."""
    try:
        event = json.loads(line)
        event = without_checksum(event) if isinstance(event, dict) else {}
    except (ValueError, RecursionError):
        return None
    if not isinstance(event.get("event"), str):
        return None
    step, values, wall = event.get("step"), event.get("values", {}), event.get("wall", 0.0)
    if type(step) is not int or step < 0 or not isinstance(values, dict):
        return None
    numbers = (wall, event.get("in_steps", 0.0), *values.values())
    return event if all(type(number) in (int, float) for number in numbers) else None


@functools.lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    log.warning(text)


def read_status(folder: Path | str) -> dict[str, Any] | None:
    """Returns the content of a run's `status.json`, or None if there is none, or nothing in it.

    Keys that older runs lack are left out, but for the step, the number of steps and the heartbeat.

    Raises:
        UserError: if it cannot be read, or is not a run's.
    """
    path = Path(folder) / "status.json"
    status = read_json(path, MEND)
    if not status:
        return None
    status = {"step": 0, "steps": 0, "heartbeat": 0.0, **status}
    for key, kind in STATUS.items():
        if key in status or key == "status":
            try:
                check_value(status.get(key), kind, key)
            except UserError as e:
                raise UserError(f"{path}: {e}; {MEND}") from None
    return status


def read_description(folder: Path | str) -> dict[str, Any] | None:
    """Returns the content of a run's `config.json`, or None if there is none.

    Raises:
        UserError: if it cannot be read, or is not a run's.
    """
    path = Path(folder) / "config.json"
    description = read_json(path, MEND)
    if description is None:
        return None
    for key in SECTIONS:
        section = description.get(key)
        absent = section is None and key != "config"
        if not absent and not isinstance(section, dict):
            raise UserError(f"{path}: {key}={shown(section)}: must be an object, of a run; {MEND}")
    parts = {
        "config": description["config"],
        "helpers": description.get("helpers") or {},
        "imported": {"set": (description.get("imported") or {}).get("set", {})},
    }
    for key, part in parts.items():
        for name, value in part.items():
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key}.{name}={shown(value)}: must be an object; {MEND}")
    for name, values in parts["imported"]["set"].items():
        if not isinstance(values, list) or len(values) != 2:
            raise UserError(f"{path}: imported.set.{name}={shown(values)}: must be two values; {MEND}")
    _check_cost(path, description.get("cost"))
    return description


def _check_cost(path: Path, cost: dict[str, Any] | None) -> None:
    for name in COST if cost is not None else ():
        value = (cost or {}).get(name, "nothing")
        if type(value) not in (int, float) and (
            value is not None or name not in ("tokens", "train_flops_per_step")
        ):
            raise UserError(f"{path}: cost.{name}={shown(value)}: must be a number; {MEND}")
