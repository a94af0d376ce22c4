"""Files: an atomic write takes what killed ones left along, and nothing of those that go on."""

import os
from pathlib import Path

import pytest

from scaling import files
from scaling.errors import UserError


def test_the_temporaries_of_killed_writes_go_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "status[1].json"  # no pattern
    for name, age in ((".status[1].json.7", 60), (".status[1].json.8", 0), (".status1.json.9", 60)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, tmp_path.stat().st_mtime - age))
    with files.open_locked(tmp_path / ".status[1].json.10"):  # is being written
        os.utime(tmp_path / ".status[1].json.10", (0, 0))
        files.write_atomic(path, "whole")
        left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".status1.json.9", ".status[1].json.10", ".status[1].json.8", "status[1].json"]
    assert path.read_text() == "whole"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("old")
    with pytest.raises(UserError, match=r"folder: cannot be written \(Is a directory\)"):
        files.write_atomic(tmp_path / "folder", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
