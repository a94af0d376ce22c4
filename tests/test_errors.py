"""Errors for users are one line, whatever the names are that they quote."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.cli import main
from scaling.errors import NotFinite, UserError, one_line


@given(st.text(st.characters()))
def test_an_error_is_one_line_that_steers_no_terminal(text: str) -> None:
    for error in (UserError(text), NotFinite(text), pickle.loads(pickle.dumps(UserError(text)))):
        assert str(error) == one_line(text) and len(str(error).splitlines()) <= 1
        assert "\x1b" not in str(error) and "\x9b" not in str(error)
        str(error).encode()  # a file or a pipe takes it


def test_other_text_stays_as_it_is() -> None:
    assert one_line("é 鳥 \\n \xa0 \u200b") == "é 鳥 \\n \xa0 \u200b"
    assert one_line("a\nb\r\t\x1b[2J\x85\u2028\udcff") == r"a\nb\r\t\x1b[2J\x85\u2028\udcff"


def test_the_command_line_prints_it_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config=no\nsuch\u2028file.py", "--workdir=run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
