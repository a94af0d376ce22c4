"""Processes: told apart by their starts, stopped by signals, and ended with their parents."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling import processes


def test_a_process_is_told_from_an_earlier_one_of_its_number() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = processes.start_time(process.pid)
    own = processes.start_time(os.getpid())
    assert started is not None and own is not None and started > own
    assert processes.lives(process.pid, started) and processes.lives(process.pid, None)
    assert not processes.lives(process.pid, started - 1)
    process.communicate(b"\n")
    assert not processes.lives(process.pid, started) and processes.start_time(process.pid) is None


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_stops_a_program_is_an_exception(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(processes.Stopped, match=f"^{signum.name}$") as error, processes.stop_by_exception():
        signal.raise_signal(signum)
    assert error.value.signum == signum and signal.getsignal(signum) == before


def test_what_python_ignores_is_raised_again() -> None:
    """As jax's callback of the garbage collector would swallow it."""

    class Deaf:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(processes.Stopped, match=r"^SIGTERM$"), processes.stop_by_exception():
        deaf = Deaf()
        del deaf
        time.sleep(5)


def test_an_error_that_a_signal_became_is_the_signal() -> None:
    """As while a module in C is imported."""
    with pytest.raises(processes.Stopped, match=r"^SIGTERM$"), processes.stop_by_exception():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise ImportError("no such module") from None
    with pytest.raises(ImportError), processes.stop_by_exception():
        raise ImportError("no such module")


def test_a_hang_up_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert signal.SIGHUP not in processes.stop_signals()
        with processes.stop_by_exception():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def _child(pids: "multiprocessing.Queue[int]") -> None:
    processes.end_with_parent()
    pids.put(os.getpid())
    time.sleep(60)


def _parent(path: str) -> None:
    context = multiprocessing.get_context("spawn")
    pids: multiprocessing.Queue[int] = context.Queue()
    context.Process(target=_child, args=(pids,)).start()
    Path(path).write_text(str(pids.get()))
    time.sleep(60)


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=_parent, args=(str(tmp_path / "pid"),))
    parent.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = int((tmp_path / "pid").read_text())
    os.kill(child, signal.SIGINT)  # as a terminal sends it to all
    assert processes.lives(child, None)
    parent.kill()
    parent.join()
    while processes.start_time(child) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
