"""Processes: which one a number means, which signals stop them, and what ends with them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# --- signals ---

DEAF = ("__del__", "_xla_gc_callback")  # functions whose exceptions Python ignores; the second is jax's


class Stopped(KeyboardInterrupt):
    """The exception by which SIGTERM and SIGHUP end a verb, as Ctrl-C does by `KeyboardInterrupt`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def stop_signals() -> list[int]:
    """Returns the signals that stop a program; SIGHUP is none where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


@contextlib.contextmanager
def stop_by_exception() -> Iterator[None]:
    """Has the signals that stop a program raise `Stopped` in the main thread, until the block ends.

    Raises:
        Stopped: upon a signal; a moment later where Python ignores exceptions (`__del__`, a callback of the
            garbage collector), and in place of an error that it became (while jaxlib is imported).
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in no other
        yield
        return

    heard: list[int] = []

    def _stop(signum: int, frame: FrameType | None) -> None:
        heard.append(signum)
        while frame is not None:
            if frame.f_code.co_name in DEAF:
                threading.Timer(0.01, os.kill, (os.getpid(), signum)).start()  # once it has returned
                return
            frame = frame.f_back
        raise Stopped(signum)

    previous = {signum: signal.signal(signum, _stop) for signum in stop_signals()}
    try:
        yield
    except Exception:
        if heard:
            raise Stopped(heard[0]) from None
        raise
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


# --- lives ---


def start_time(pid: int) -> int | None:
    """Returns when a process started, in ticks of the system's clock; None where the system does not say.

    A number is given to another process later; with its start it is that of one process only.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return int(stat.rpartition(b")")[2].split()[19])  # field 22; the second, a name, may hold spaces


def lives(pid: int, started: int | None) -> bool:
    """Returns whether the process of that number and start lives; any start will do where it is None."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return started is None or start_time(pid) in (started, None)


def end_with_parent(*_: int) -> None:
    """Has this process of `multiprocessing` end within moments of its parent, however that ends.

    What a terminal sends to all its processes is left to the parent.
    """
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
