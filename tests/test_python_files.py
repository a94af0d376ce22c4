"""Files of Python that the user writes: what is wrong with them is one line that names file and line."""

from pathlib import Path

import pytest

from scaling.errors import UserError
from scaling.python_files import call, load_module


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"x = 1\ndef f(:\n", r"c\.py, line 2: SyntaxError"),
        (b"x = 1\n\n1 / 0\n", r"c\.py, line 3: ZeroDivisionError: division by zero"),
        (b"import nothing_such\n", r"c\.py, line 1: ModuleNotFoundError: .*nothing_such"),
        (b"import sys\nsys.exit(0)\n", r"c\.py, line 2: SystemExit"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"x = 1\0", r"c\.py.*(null|source)"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "c.py"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load_module(file, "config")
    assert "\n" not in str(caught.value)


def test_what_a_function_raises_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "c.py"
    file.write_text("def f(x):\n    return {}[x]\n")
    module = load_module(file, "config")
    with pytest.raises(UserError, match=r"c\.py, line 2: KeyError: 'b'"):
        call(file, module.f, "b")


def test_what_is_no_file_of_python(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("x = 1")
    for path in (tmp_path, tmp_path / "c.txt"):
        with pytest.raises(UserError, match="is no Python file"):
            load_module(path, "config")
    with pytest.raises(UserError, match="cannot be read"):
        load_module(tmp_path / "absent.py", "config")
