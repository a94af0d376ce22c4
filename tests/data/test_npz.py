"""npz files of the user's: read whole, or refused in one line before anything large is read."""

import logging
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.data.sources.arrays import ArraySource, npz
from scaling.errors import UserError
from tests.faults.bad_data import bad_npz

# Those of which the train split can be read; others of their splits are checked by who reads them.
READ = ("no test", "other size", "empty train", "empty test", "junk beside")


@pytest.mark.parametrize("kind", [kind for kind in bad_npz() if kind not in READ])
def test_a_bad_file_is_one_line(kind: str, tmp_path: Path) -> None:
    path = bad_npz()[kind](tmp_path)
    with pytest.raises(UserError) as caught:
        npz(path, "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_labels_that_begin_at_1_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = np.arange(32) % 10 + 1
    np.savez(tmp_path / "a.npz", train_images=np.zeros((32, 8, 8, 1), np.uint8), train_labels=labels)
    with caplog.at_level(logging.WARNING):
        assert npz(tmp_path / "a.npz", "train").num_classes == 11
    assert "no example has label 0" in caplog.text


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_damaged_file_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        np.savez(path, train_images=np.zeros((4, 8, 8, 1), np.uint8), train_labels=np.arange(4))
        content = bytearray(path.read_bytes())
        for place, value in changes:
            content[place % len(content)] = value
        path.write_bytes(content)
        read = _read_or_refuse(path)
        assert read is None or (read.labels.tolist() == [0, 1, 2, 3] and not read.images.any())


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_a_member_of_any_bytes_is_read_or_refused(header: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + header)
            file.writestr("train_labels.npy", header)
        read = _read_or_refuse(path)
        assert read is None or len(read.images) == len(read.labels)


def _read_or_refuse(path: Path) -> ArraySource | None:
    try:
        return npz(path, "train")
    except UserError as e:
        assert "\n" not in str(e)
        return None
