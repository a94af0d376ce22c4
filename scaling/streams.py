"""Standard streams that may be closed, full or unread: what is said is then lost, and work goes on."""

import contextlib
import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # nobody reads: a pipe's reader or the terminal has ended


class _Lossy(io.FileIO):
    """A descriptor to write to, which drops what it cannot write, and keeps the first error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
            if written is not None:
                return written
            failure = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as e:
            failure = e
        self.error = self.error or failure
        return len(memoryview(data).cast("B"))


def secure() -> None:
    """Makes the standard streams such that writing to them never fails.

    Descriptors 0 to 2 that are closed are opened on the null device: the next file to be opened would have
    such a number, and libraries print to it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is `fd`
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (for as long as the process lives)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # not one that a test or a caller has put there
            with contextlib.suppress(AttributeError, OSError):
                stream.flush()
            buffer = io.BufferedWriter(_Lossy(fd, "w", closefd=False))
            encoding = getattr(stream, "encoding", "utf-8")
            text = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, text)


def lost() -> str | None:
    """Returns why some of stdout could not be written, such as a full disk; else None."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Lossy) else None
    return error.strerror if error is not None and error.errno not in GONE else None
