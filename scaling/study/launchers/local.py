"""Jobs on this machine, in processes that take one after the other (`scaling/worker.py`)."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from scaling.progress import say
from scaling.study.jobs import Job
from scaling.study.results import last_line

WORKER = (sys.executable, "-m", "scaling.worker")


class Local:
    """The launcher of worker processes, each with its share of the machine's cores.

    A worker keeps its imports and compiled steps from job to job. One that ends takes no job with it but its
    own, and the next job starts another.
    """

    def __init__(self, env: Mapping[str, str], jobs_at_a_time: int) -> None:
        self.env = env
        self.workers: list[_Worker | None] = [None] * jobs_at_a_time

    def submit(self, job: Job) -> "_Handle":
        """Gives the job to a worker, or waits for an earlier sweep's process that is training the run."""
        handle = _Handle(job, earlier=job.trained_by())
        if handle.earlier is None:
            self._start(handle)
        else:
            process = handle.earlier or ""
            say(f"{job.name}: an earlier sweep's process {process} is still training it; waiting")
        return handle

    def alive(self, handle: "_Handle") -> bool:
        """Returns whether the job is being trained; what an earlier sweep left unfinished starts again."""
        if handle.earlier is not None:
            if handle.job.trained_by() is not None:
                return not handle.abandoned
            if handle.stopped or handle.job.done():
                return False
            handle.earlier = None
            self._start(handle)
        return handle.worker is not None and handle.worker.working()

    def stop(self, handle: "_Handle", signum: int) -> None:
        """Sends the job's process a signal, also that of an earlier sweep; one out of reach is left alone."""
        handle.stopped = True
        pid = handle.worker.process.pid if handle.worker else handle.job.trained_by()
        try:
            if pid:
                os.kill(pid, signum)
            else:  # on another host, if it still lives
                handle.abandoned = True
        except ProcessLookupError:
            pass
        except PermissionError:
            handle.abandoned = True

    def reason(self, handle: "_Handle") -> str:
        """Returns why the job could not start, the signal that ended it, or the last line of its log."""
        if handle.worker is None:
            return handle.error
        code, log = handle.worker.process.returncode or 0, handle.job.log
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{hint}, log in {log}"
        return f"{last_line(log)} (exit code {code}, log in {log})"

    def close(self) -> None:
        """Kills the workers: those that wait for a job have nothing to save."""
        for worker in filter(None, self.workers):
            worker.close()

    def _start(self, handle: "_Handle") -> None:
        job = handle.job
        free = [i for i, worker in enumerate(self.workers) if worker is None or not worker.busy]
        slot = max(free, key=lambda i: self.workers[i] is not None)  # a warm one, if there is one
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            with job.log.open("ab") as log:
                log.write(f"$ {shlex.join(job.command())}\n".encode())
            worker = self.workers[slot]
            if worker is None or not worker.take(job):
                if worker is not None:
                    worker.close()
                worker = self.workers[slot] = _Worker(job, _cores(slot, len(self.workers)), self.env)
            handle.worker = worker
        except OSError as e:
            where = f"cannot be started in {job.folder} ({e.strerror})"
            handle.error = f"{where}; free space or choose another folder"


@dataclass
class _Handle:
    """A job with the worker that trains it, or with the process of an earlier sweep."""

    job: Job
    earlier: int | None  # process of an earlier sweep, 0 if on another host
    worker: "_Worker | None" = None
    error: str = ""  # why it could not start
    stopped: bool = False
    abandoned: bool = False  # out of reach of signals: it is waited for no more


def _cores(slot: int, slots: int) -> set[int] | None:
    """Returns the cores of one of several workers: an equal share, or a shared core if there are too few."""
    if slots == 1 or not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[slot::slots]) or {cores[slot % len(cores)]}


class _Worker:
    """A process that trains one run at a time."""

    def __init__(self, job: Job, cores: set[int] | None, env: Mapping[str, str]) -> None:
        before = os.sched_getaffinity(0) if cores else None
        try:
            if cores:
                os.sched_setaffinity(0, cores)  # the child inherits it before it starts any thread
            with job.log.open("ab") as log:
                # A session of its own: Ctrl-C in the terminal reaches it once, through this process.
                self.process = subprocess.Popen(
                    WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0, env=env,
                    start_new_session=True,
                )  # fmt: skip
        finally:
            if before:
                os.sched_setaffinity(0, before)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.jobs, self.answers = self.process.stdin, self.process.stdout
        os.set_blocking(self.answers.fileno(), False)
        self.busy = self.take(job)

    def take(self, job: Job) -> bool:
        """Gives the process a job; returns whether it was there to take it."""
        line = json.dumps({"arguments": job.arguments(), "log": str(job.log)}) + "\n"
        try:
            self.jobs.write(line.encode())
        except BrokenPipeError:
            return False
        self.busy = True
        return True

    def working(self) -> bool:
        """Returns whether the job is being trained: the process lives, and has not answered."""
        ended = self.process.poll() is not None  # before the answer is looked for, which it may leave behind
        self.busy = self.busy and not self.answers.read(1) and not ended
        return self.busy

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.jobs.close()
        self.answers.close()
