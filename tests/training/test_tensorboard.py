"""TensorBoard files: scalars and pictures that TensorBoard's reader finds, and a disk that is full."""

import errno
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from scaling.errors import UserError
from scaling.training import config, loop, tensorboard
from scaling.training.tensorboard import TensorBoard


def events(folder: Path) -> list[Event]:
    """The events of a folder's only file, by the format of TFRecords."""
    (path,) = folder.iterdir()
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_a_runs_values_and_pictures_are_there(tmp_path: Path, tiny: dict[str, str]) -> None:
    sampling = 'sampling=dict(integrator="euler", steps=2)'
    grid = f'samples=dict(name="grid", every="2 steps", samples=5, batch_size=8, {sampling})'
    text = Path(tiny["dit"]).read_text().replace("checkpoint=", f"evaluators=dict({grid}),\n checkpoint=")
    (tmp_path / "config.py").write_text(text)
    loop.train(config.load(str(tmp_path / "config.py"), ["train.duration=3 steps"]), tmp_path)
    first, *others = events(tmp_path / "tensorboard")
    assert first.file_version == "brain.Event:2"
    values = [(event.step, value) for event in others for value in event.summary.value]
    scalars = {(step, value.tag): value.simple_value for step, value in values}
    assert {tag for step, tag in scalars if step == 2} == {
        "loss", "mse", "grad_norm", "learning_rate", "examples_per_second", "samples",
    }  # fmt: skip
    rates = [scalars[step, "learning_rate"] for step in (1, 2, 3)]
    assert rates == pytest.approx([0.0, 0.0005, 0.001])  # two steps of warm-up
    picture = next(v for step, v in values if (step, v.tag) == (2, "samples")).image
    shown = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)).convert("L"))
    written = np.asarray(Image.open(tmp_path / "samples/step_00000002.png").convert("L"))
    np.testing.assert_array_equal(shown, written)


def test_a_full_disk_is_an_error_at_the_next_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = r"tfevents.*: cannot be written \(No space left on device\); free"
    with pytest.raises(UserError, match=said), TensorBoard(tmp_path / "tensorboard") as board:
        monkeypatch.setattr(tensorboard, "write_all", full)
        board.write_scalars(1, {"loss": 1.0})
