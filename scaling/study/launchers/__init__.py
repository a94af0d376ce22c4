"""Launchers by name: where the jobs of a sweep run.

A launcher starts jobs and stops them. How far a run is, and how it ended, is read from its folder.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from scaling.study.jobs import Job
from scaling.study.launchers.local import Local


class Launcher(Protocol):
    """The protocol of launchers. A handle is whatever a launcher knows a job by."""

    def submit(self, job: Job) -> Any:
        """Has the job run, now or later, and returns its handle.

        A run that an earlier sweep's job is still training is waited for, and resumed if that leaves it
        unfinished.
        """
        ...

    def alive(self, handle: Any) -> bool:
        """Returns whether the job waits or runs."""
        ...

    def stop(self, handle: Any, signum: int) -> None:
        """Sends the job SIGINT or SIGTERM, upon which it saves and ends, or SIGKILL; one that waits ends."""
        ...

    def reason(self, handle: Any) -> str:
        """Returns why a job ended whose run is not done, where the run's folder does not say it."""
        ...

    def close(self) -> None:
        """Ends everything that was started here."""
        ...


# Each takes the environment of the jobs' processes, and the number of jobs at a time.
LAUNCHERS: dict[str, Callable[[Mapping[str, str], int], Launcher]] = {"local": Local}
