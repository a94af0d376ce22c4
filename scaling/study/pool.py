"""Jobs of a sweep: some at a time on a launcher, watched through their run folders, stopped together."""

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self

from scaling.processes import stop_signals
from scaling.progress import Progress, say
from scaling.run.folder import read_events
from scaling.study.jobs import Job
from scaling.study.launchers import Launcher

POLL_SECONDS = 0.2  # time between two looks at the jobs
LOOK_SECONDS = 0.5  # time between two looks at how far they are


def run(
    jobs: Sequence[Job], workers: int, start: Callable[[int], Launcher], title: str
) -> tuple[int | None, dict[str, str]]:
    """Runs every job that is not done, `workers` at a time, under one progress bar.

    Ctrl-C, SIGTERM and SIGHUP are passed on, and the runs save and exit; a second signal kills them. `start`
    makes the launcher of so many jobs at a time.

    Returns:
        The signal that stopped the jobs (or None), and the reason of each failed job.
    """
    done_before = [job for job in jobs if job.done()]
    pending = deque(job for job in jobs if job not in done_before)
    workers = min(workers, max(1, len(pending)))
    attempts: list[_Attempt] = []
    submitted: list[_Attempt] = []
    failed: dict[str, str] = {}
    began = time.monotonic()
    with (
        _Signals() as signals,
        _Bar(jobs, done_before, title) as bar,
        contextlib.closing(start(workers)) as launcher,
    ):
        while attempts or (pending and not signals.first):
            for attempt in [a for a in attempts if not launcher.alive(a.handle)]:
                attempts.remove(attempt)
                bar.ended(attempt.job.name, attempt.failure(), failed, bool(signals.first))
            while pending and len(attempts) < workers and not signals.first:
                attempts.append(_Attempt(pending.popleft(), launcher))
                submitted.append(attempts[-1])
            signals.forward(attempts)
            bar.show([a.job for a in attempts])
            time.sleep(POLL_SECONDS)
    if submitted:
        print(_share(submitted, workers, time.monotonic() - began, title))
    return signals.first, failed


def _share(submitted: Sequence["_Attempt"], workers: int, seconds: float, title: str) -> str:
    """Describes the share of the workers' time that the jobs spent in training steps."""
    stepping = sum(attempt.seconds_in_steps() for attempt in submitted)
    return (
        f"{title}: {stepping:.0f} s in training steps are {stepping / (workers * seconds):.0%} of "
        f"{workers} x {seconds:.0f} s (workers x wall time); the rest is start-up, compilation, evaluation, "
        "checkpoints and waiting for jobs"
    )


@dataclass
class _Attempt:
    """A job that was submitted."""

    job: Job
    launcher: Launcher
    before: dict[str, Any] = field(init=False)  # status of the run when it was submitted
    handle: Any = field(init=False)

    def __post_init__(self) -> None:
        self.before, self.handle = self.job.status(), self.launcher.submit(self.job)

    def seconds_in_steps(self) -> float:
        """Returns the time that the run has spent in training steps since it was submitted."""
        resumed = self.before.get("saved") or 0
        events = [event for event in read_events(self.job.folder) if event["step"] > resumed]
        return sum(float(event.get("in_steps", 0.0)) for event in events)

    def failure(self) -> str | None:
        """Returns why the run is not done, or None if it is."""
        status = self.job.status()
        if status.get("status") == "done" and (status != self.before or self.job.done()):
            return None
        if status.get("status") == "failed" and status != self.before and status.get("reason"):
            return str(status["reason"])
        return self.launcher.reason(self.handle)


class _Signals:
    """A context that catches the signals that stop a program, so that the runs can save."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.pending: list[int] = []

    def __enter__(self) -> Self:
        self.before = {signum: signal.signal(signum, self._catch) for signum in stop_signals()}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        self.pending.append(signum if self.first is None else signal.SIGKILL)
        self.first = self.first or signum

    def forward(self, attempts: Sequence[_Attempt]) -> None:
        """Passes the signals caught since the last call on to the runs."""
        while self.pending:
            signum = self.pending.pop(0)
            if signum == signal.SIGKILL:
                say("killing the runs; what they saved before stays")
            else:
                say(f"{len(attempts)} runs are saving; once more to kill them")
                # A run that was started under nohup does not hear SIGHUP.
                signum = signal.SIGTERM if signum == signal.SIGHUP else signum
            for attempt in attempts:
                attempt.launcher.stop(attempt.handle, signum)


class _Bar:
    """Progress over all runs: how many are done (in fractions), and the steps of current ones."""

    def __init__(self, jobs: Sequence[Job], done_before: Sequence[Job], title: str) -> None:
        self.jobs, self.finished = jobs, {job.name for job in done_before}
        self.updated = 0.0
        self.progress = Progress(title, len(jobs), "run", start=round(self._done(), 1))
        if done_before:
            say(f"{title}: {len(done_before)} of {len(jobs)} runs are done and kept")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.update(self._done())
        self.progress.close()

    def _done(self) -> float:
        return sum(1.0 if job.name in self.finished else job.fraction() for job in self.jobs)

    def ended(self, name: str, reason: str | None, failed: dict[str, str], stopping: bool) -> None:
        """Prints how a run ended, and notes the reason in `failed` if it failed."""
        if reason is not None and stopping:
            return  # the run has saved and will be resumed
        self.finished.add(name)
        if reason is not None:
            failed[name] = reason
        say(f"done: {name}" if reason is None else f"failed: {name}: {reason}")

    def show(self, jobs: Sequence[Job]) -> None:
        """Updates the progress, unless it was updated a moment ago."""
        if time.monotonic() - self.updated < LOOK_SECONDS:
            return
        self.updated = time.monotonic()
        statuses = [(job.name, job.status()) for job in jobs]
        steps = (f"{name} {s['step']}/{s['steps']}" for name, s in statuses if s.get("steps"))
        self.progress.update(self._done(), ", ".join(steps))
