"""Runs as processes: started together, watched through their run folders, stopped together."""

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
POLL_SECONDS = 0.2  # time between two looks at the processes
BEAT_SECONDS = 60.0  # age below which a heartbeat is that of a living process


@dataclass(frozen=True)
class Job:
    """One run to be trained: its folder and its command."""

    name: str
    folder: Path
    config: str
    flags: Sequence[str]

    def command(self) -> list[str]:
        """Returns the command that trains the run."""
        return [*TRAIN, f"--config={self.config}", *self.flags, "--workdir", str(self.folder)]

    def status(self) -> dict[str, Any]:
        """Returns the run folder's `status.json`, or {} if it has none that can be read."""
        try:
            return read_json(self.folder / "status.json") or {}
        except UserError:
            return {}  # as if the run had never started; the trainer says what is wrong

    def done(self) -> bool:
        """Returns whether the run is done."""
        return self.status().get("status") == "done"

    def fraction(self) -> float:
        """Returns how much of the run is trained, from 0 to 1."""
        status = self.status()
        return status["step"] / status["steps"] if status.get("steps") else 0.0

    def alive(self) -> int | None:
        """Returns the process of an earlier sweep that is training it now (0 if on another host), or None."""
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

    Ctrl-C, SIGTERM and SIGHUP are passed on, and the runs save and exit; a second signal kills them.

    Returns:
        The signal that stopped the jobs (or None), and the reason of each failed job.
    """
    done_before = [job for job in jobs if job.done()]
    pending = deque(job for job in jobs if job not in done_before)
    slots: list[_Worker | None] = [None] * min(workers, max(1, len(pending)))
    failed: dict[str, str] = {}
    with _Signals() as signals, _Bar(jobs, done_before, title) as bar:
        try:
            while any(slots) or (pending and not signals.first):
                for i, worker in enumerate(slots):
                    if worker is None and pending and not signals.first:
                        worker = slots[i] = _Worker(pending.popleft(), _cores(i, len(slots)), env)
                    if worker is None or worker.running():
                        continue
                    slots[i] = None
                    if worker.left_unfinished():
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
    """Returns the cores of one of several workers: an equal share, or a shared core if there are too few."""
    if slots == 1 or not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[slot::slots]) or {cores[slot % len(cores)]}


class _Worker:
    """A job in progress: a child process, or one of an earlier sweep that is still training it."""

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
                    os.sched_setaffinity(0, cores)  # the child inherits it before it starts any thread
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
        """Returns whether the process is still training."""
        if self.process is None:
            return self.left_by is not None and self.job.alive() is not None
        return self.process.poll() is None

    def left_unfinished(self) -> bool:
        """Returns whether an earlier sweep's process ended without finishing the run."""
        return self.left_by is not None and not self.job.done()

    def send(self, signum: int) -> None:
        """Sends the process a signal."""
        pid = self.process.pid if self.process else self.left_by
        if pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signum)

    def kill(self) -> None:
        """Kills the process, unless it is an earlier sweep's."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def failure(self) -> str | None:
        """Returns why the run is not done, or None if it is."""
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
    """A context that catches the signals that stop a program, so that the runs can save."""

    CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.first: int | None = None
        self.pending: list[int] = []

    def __enter__(self) -> Self:
        # Under nohup, SIGHUP is ignored, and stays so.
        signums = [s for s in self.CAUGHT if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self.before = {s: signal.signal(s, self._catch) for s in signums}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        self.pending.append(signum if self.first is None else signal.SIGKILL)
        self.first = self.first or signum

    def forward(self, workers: Sequence[_Worker]) -> None:
        """Passes the signals caught since the last call on to the runs."""
        while self.pending:
            signum = self.pending.pop(0)
            if signum == signal.SIGKILL:
                tqdm.write("killing the runs; what they saved before stays")
            else:
                tqdm.write(f"{len(workers)} runs are saving; once more to kill them")
            for worker in workers:
                worker.send(signum)


class _Bar:
    """A progress bar over all runs: how many are done (in fractions), steps of current ones, time left."""

    def __init__(self, jobs: Sequence[Job], done_before: Sequence[Job], title: str) -> None:
        self.jobs, self.finished = jobs, {job.name for job in done_before}
        self.every = 0.5 if sys.stderr.isatty() else 10.0  # seconds between updates; rarer in a log file
        self.updated = 0.0
        self.bar = tqdm(
            total=len(jobs), initial=self._progress(), desc=title, dynamic_ncols=True,
            bar_format="{desc}: {n:.1f}/{total} runs |{bar}| {elapsed}, {remaining} left{postfix}",
        )  # fmt: skip
        if done_before:
            tqdm.write(f"{title}: {len(done_before)} of {len(jobs)} runs are done and kept")

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
        """Prints how a run ended, and notes it in `failed` if it did."""
        name, reason = worker.job.name, worker.failure()
        if reason is not None and stopping:
            return  # the run has saved and will be resumed
        self.finished.add(name)
        if reason is not None:
            failed[name] = reason
        tqdm.write(f"done: {name}" if reason is None else f"failed: {name}: {reason}")

    def show(self, workers: Sequence[_Worker]) -> None:
        """Updates the bar, unless it was updated a moment ago."""
        if time.monotonic() - self.updated < self.every:
            return
        self.updated = time.monotonic()
        statuses = [(w.job.name, w.job.status()) for w in workers]
        self._draw(", ".join(f"{name} {s['step']}/{s['steps']}" for name, s in statuses if s.get("steps")))
