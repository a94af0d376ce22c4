"""TensorBoard files of what a run logs."""

import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from clu import asynclib

from scaling.errors import UserError
from scaling.files import make_folder, write_all


def _import_tensorboardx() -> Any:
    """Imports tensorboardX without PyTorch, which it would load if installed, taking 2 s."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX.event_file_writer
        import tensorboardX.summary
    finally:
        if absent:
            del sys.modules["torch"]
    return tensorboardX


class TensorBoard:
    """A writer of scalars and pictures, in a thread of its own (`clu.asynclib`). Use it as a context manager.

    `clu.metric_writers` does the same through TensorFlow, which it imports; tensorboardX needs none. Its own
    writer's thread dies of a full disk unnoticed, and then all others wait for it.
    """

    def __init__(self, folder: Path) -> None:
        self._format = _import_tensorboardx()
        self.path = folder / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}"
        self._pool = asynclib.Pool("tensorboard", max_workers=1)  # one thread keeps the order
        self._file: IO[bytes] | None = None  # opened when there is something to write

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._pool.close()
        except asynclib.AsyncError as e:
            if error is None:
                raise self._failed(e.__cause__ or e) from e
        finally:
            if self._file is not None:
                self._file.close()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one value per name.

        Raises:
            UserError: if an earlier write failed, for a full disk say.
        """
        values = [self._format.summary.scalar(name, value).value[0] for name, value in scalars.items()]
        self._append(step=step, summary=self._format.summary.Summary(value=values))

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes a picture uint8 [H, W, 1 or 3].

        Raises:
            UserError: as `write_scalars` does.
        """
        self._append(step=step, summary=self._format.summary.image(name, picture, dataformats="HWC"))

    def _append(self, **fields: Any) -> None:
        """Appends an event in the background, framed as a TFRecord: length, its checksum, data, checksum."""
        if self._file is None:
            make_folder(self.path.parent)
            try:
                self._file = self.path.open("ab", buffering=0)
            except OSError as e:
                raise self._failed(e) from e
            self._append(file_version="brain.Event:2")
        checksum = self._format.record_writer.masked_crc32c
        event = self._format.event_file_writer.event_pb2.Event(wall_time=time.time(), **fields)
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        frame = length + struct.pack("<I", checksum(length)) + data + struct.pack("<I", checksum(data))
        try:
            self._pool(write_all)(self._file, frame)
        except asynclib.AsyncError as e:
            raise self._failed(e.__cause__ or e) from e

    def _failed(self, error: BaseException) -> UserError:
        reason = error.strerror if isinstance(error, OSError) else error
        return UserError(f"{self.path}: cannot be written ({reason}); free space, then resume")
