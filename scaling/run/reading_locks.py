"""Locks of readers on checkpoints, which a run that goes on does not delete meanwhile."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from orbax.checkpoint.checkpoint_managers import preservation_policy

from scaling.files import open_locked
from scaling.run.checkpoint_reading import gather_texts


@contextlib.contextmanager
def held(checkpoint: Path) -> Iterator[None]:
    """Holds a lock on `checkpoints/<step>` while it is read; the lock ends with the process at the latest.

    In a folder that this process cannot write, nothing is held.
    """
    folder = _folder(checkpoint.parent)
    path = folder / f"{checkpoint.name}.{os.getpid()}.{threading.get_ident()}"
    try:
        folder.mkdir(exist_ok=True)
        file = open_locked(path)
    except OSError:
        yield
        return
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another reader's is in it
                folder.rmdir()


def read_steps(checkpoints: Path) -> set[int]:
    """Returns the steps that some process is reading."""
    return {
        int(path.name.split(".")[0]) for path in _folder(checkpoints).glob("*.*.*") if not _left_behind(path)
    }


def _folder(checkpoints: Path) -> Path:
    return checkpoints.parent / "reading"


def _left_behind(path: Path) -> bool:
    """Returns whether the process that locked the file has ended; its file is then removed."""
    try:
        with open_locked(path):
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except OSError:  # the reader has just finished
        return True
    return True


class KeepWhatIsRead:
    """A preservation policy of orbax: checkpoints that are being read stay until a later save."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints

    def should_preserve(
        self,
        checkpoints: Sequence[preservation_policy.PolicyCheckpointInfo],
        *,
        context: preservation_policy.PreservationContext,
    ) -> list[bool]:
        """Returns for each checkpoint whether it is read, as the first process sees it."""
        steps = gather_texts(" ".join(map(str, read_steps(self.checkpoints))))[0].split()
        return [str(checkpoint.step) in steps for checkpoint in checkpoints]
