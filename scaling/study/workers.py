"""Runs as processes: started, watched through their run folders, stopped together."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from tqdm import tqdm

from scaling.errors import UserError
from scaling.files import read_json
from scaling.study.results import last_line

TRAIN = (sys.executable, "-m", "scaling", "train")
POLL_SECONDS = 0.2
BEAT_SECONDS = 60.0  # a heartbeat younger than this is that of a living process


@dataclass(frozen=True)
class Job:
    """One run to be trained: its folder and its command."""

    name: str
    folder: Path
    config: str
    flags: Sequence[str]

    def command(self) -> list[str]:
        return [*TRAIN, f"--config={self.config}", *self.flags, "--workdir", str(self.folder)]

    def status(self) -> dict[str, Any]:
        try:
            return read_json(self.folder / "status.json") or {}
        except UserError:
            return {}  # unreadable: as if it had never started; the trainer says what is wrong

    def done(self) -> bool:
        return self.status().get("status") == "done"

    def fraction(self) -> float:
        """How much of it is trained, from 0 to 1."""
        status = self.status()
        return status["step"] / status["steps"] if status.get("steps") else 0.0

    def alive(self) -> int | None:
        """The process that is training it now, started by nobody here (0 if on another host), else None."""
        status = self.status()
        if status.get("status") != "running" or time.time() - status["heartbeat"] > BEAT_SECONDS:
            return None
        if status["host"] != socket.gethostname():
            return 0
        try:
            os.kill(status["pid"], 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return int(status["pid"])


def run(
    jobs: Sequence[Job], workers: int, env: Mapping[str, str], title: str
) -> tuple[int | None, dict[str, str]]:
    """Runs every job that is not done, `workers` at a time, under one progress bar.

    Ctrl-C, SIGTERM and SIGHUP are passed on, and the runs save and leave; a second signal kills them.

    Returns:
        The signal that stopped it (or None), and the reason of each failed job.
    """
    kept = [job for job in jobs if job.done()]
    pending = deque(job for job in jobs if job not in kept)
    slots: list[_Worker | None] = [None] * min(workers, max(1, len(pending)))
    failed: dict[str, str] = {}
    with _Signals() as signals, _Bar(jobs, kept, title) as bar:
        try:
            while any(slots) or (pending and not signals.first):
                for i, worker in enumerate(slots):
                    if worker is None and pending and not signals.first:
                        worker = slots[i] = _Worker(pending.popleft(), _cores(i, len(slots)), env)
                    if worker is None or worker.running():
                        continue
                    slots[i] = None
                    if worker.again():
                        pending.appendleft(worker.job)
                    else:
                        bar.ended(worker, failed, bool(signals.first))
                signals.forward([w for w in slots if w])
                bar.show([w for w in slots if w])
                time.sleep(POLL_SECONDS)
        finally:
            for worker in filter(None, slots):
                worker.kill()
    return signals.first, failed


def _cores(slot: int, slots: int) -> set[int] | None:
    """The cores of one of several workers: an equal share, or one that is shared if there are too few."""
    if slots == 1 or not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[slot::slots]) or {cores[slot % len(cores)]}


class _Worker:
    """A job in progress: a child, or a process that an earlier sweep left behind and that is waited for."""

    def __init__(self, job: Job, cores: set[int] | None, env: Mapping[str, str]) -> None:
        self.job, self.log, self.left_by = job, job.folder / "log.txt", job.alive()
        self.process: subprocess.Popen[bytes] | None = None
        self.error: str | None = None
        if self.left_by is not None:
            tqdm.write(
                f"{job.name}: an earlier sweep's process {self.left_by or ''} is still training it; waiting"
            )
            return
        before = os.sched_getaffinity(0) if cores else None
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                log.write(f"$ {shlex.join(job.command())}\n".encode())
                log.flush()
                if cores:
                    os.sched_setaffinity(0, cores)  # the child inherits it, so no thread of it escapes
                # A session of its own: Ctrl-C in the terminal reaches it once, through this process.
                self.process = subprocess.Popen(
                    job.command(),
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    env=env,
                    start_new_session=True,
                )
        except OSError as e:
            self.error = (
                f"cannot be started in {job.folder} ({e.strerror}); free space or choose another folder"
            )
        finally:
            if before:
                os.sched_setaffinity(0, before)

    def running(self) -> bool:
        if self.process is None:
            return self.left_by is not None and self.job.alive() is not None
        return self.process.poll() is None

    def again(self) -> bool:
        """Whether the process that was waited for left the run unfinished."""
        return self.left_by is not None and not self.job.done()

    def send(self, signum: int) -> None:
        pid = self.process.pid if self.process else self.left_by
        if pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signum)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def failure(self) -> str | None:
        """Why the run is not done, or None if it is."""
        if self.process is None:
            return self.error
        status, code = self.job.status(), self.process.returncode
        if code == 0 and status.get("status") == "done":
            return None
        if (
            status.get("status") == "failed"
            and status.get("pid") == self.process.pid
            and status.get("reason")
        ):
            return str(status["reason"])
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{hint}, log in {self.log}"
        return f"{last_line(self.log)} (exit code {code}, log in {self.log})"


class _Signals:
    """Catches what stops a program, so that the runs can be told to save."""

    CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.first: int | None = None
        self.pending: list[int] = []

    def __enter__(self) -> Self:
        caught = [
            s for s in self.CAUGHT if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN
        ]  # nohup
        self.before = {s: signal.signal(s, self._catch) for s in caught}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        self.pending.append(signum if self.first is None else signal.SIGKILL)
        self.first = self.first or signum

    def forward(self, workers: Sequence[_Worker]) -> None:
        while self.pending:
            signum = self.pending.pop(0)
            if signum == signal.SIGKILL:
                tqdm.write("killing the runs; what they saved before stays")
            else:
                tqdm.write(f"{len(workers)} runs are saving; once more to kill them")
            for worker in workers:
                worker.send(signum)


class _Bar:
    """One bar over all runs: how many are done (with fractions), where the current ones are, time left."""

    def __init__(self, jobs: Sequence[Job], kept: Sequence[Job], title: str) -> None:
        self.jobs, self.finished = jobs, {job.name for job in kept}
        self.every = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file is spared
        self.shown = 0.0
        self.bar = tqdm(
            total=len(jobs), initial=self._progress(), desc=title, dynamic_ncols=True,
            bar_format="{desc}: {n:.1f}/{total} runs |{bar}| {elapsed}, {remaining} left{postfix}",
        )  # fmt: skip
        if kept:
            tqdm.write(f"{title}: {len(kept)} of {len(jobs)} runs are done and kept")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._draw("")
        self.bar.close()

    def _progress(self) -> float:
        return sum(1.0 if job.name in self.finished else job.fraction() for job in self.jobs)

    def _draw(self, current: str) -> None:
        self.bar.n = self._progress()
        self.bar.set_postfix_str(current)

    def ended(self, worker: _Worker, failed: dict[str, str], stopping: bool) -> None:
        name, reason = worker.job.name, worker.failure()
        if reason is not None and stopping:
            return  # it saved and will be resumed
        self.finished.add(name)
        if reason is not None:
            failed[name] = reason
        tqdm.write(f"done: {name}" if reason is None else f"failed: {name}: {reason}")

    def show(self, workers: Sequence[_Worker]) -> None:
        if time.monotonic() - self.shown < self.every:
            return
        self.shown = time.monotonic()
        at = [(w.job.name, w.job.status()) for w in workers]
        self._draw(", ".join(f"{name} {s['step']}/{s['steps']}" for name, s in at if s.get("steps")))
