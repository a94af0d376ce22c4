"""README: its code runs, it lists every verb, paragraphs are short; CONTRIBUTING names what is there."""

import ast
import re
import textwrap
import threading
from pathlib import Path

import pytest

from scaling import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
LINES, CHARACTERS = 4, 120  # the longest paragraph and line, code and tables apart


def code_blocks(text: str) -> list[str]:
    """Returns the fenced blocks of Python, those of list items without their indentation."""
    found = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.M | re.S)
    return [textwrap.dedent(block) for block in found]


def paragraphs(text: str) -> list[str]:
    """Returns the paragraphs, each item of a list being one; without code, tables, headings and pictures."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", text)
    return [block for block in blocks if block.strip() and not re.match(r"\n*(?: {4}|\||#|!\[)", block)]


def verbs(text: str) -> set[str]:
    """Returns the commands that the table of verbs lists."""
    return set(re.findall(r"^\| `scaling (\w+)", text, re.M))


@pytest.mark.parametrize(
    "in_main_thread",
    [pytest.param(True, marks=pytest.mark.slow), False],
    ids=["main thread", "another thread"],
)
@pytest.mark.parametrize("block", code_blocks(README), ids=lambda block: block.split("\n")[0])
def test_the_python_runs(
    block: str,
    in_main_thread: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Python installs signal handlers in the main thread alone: elsewhere, training does without."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
        except BaseException as e:
            failures.append(e)

    if in_main_thread:
        run()
    else:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert not failures, failures
    if "laws" in block:
        said = capsys.readouterr().out
        assert "val_loss" in said and said.splitlines()[-1].startswith("gmacs: exponent ")


def parser_verbs() -> set[str]:
    """Returns the verbs that the command has."""
    return set(next(action for action in cli._parser()._actions if action.dest == "verb").choices or ())


def test_the_table_has_every_verb_and_no_other() -> None:
    assert len(parser_verbs()) > 5
    assert verbs(README) == parser_verbs()


def test_every_command_is_one() -> None:
    """Everywhere in the file, in text and in code."""
    assert set(re.findall(r"(?:^ {4}|`)scaling ([a-z]+)\b", README, re.M)) == parser_verbs()


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_the_files_that_are_named_are_there(text: str) -> None:
    paths = set(re.findall(r"\]\(([^)#]+)\)", text))
    paths |= set(re.findall(r"(?:configs|experiments|notebooks|tests|scaling)/[\w/]+\.\w+", text))
    made_up = re.compile("birds|NAME")
    assert paths and [path for path in paths if not made_up.search(path) and not (ROOT / path).exists()] == []


def test_the_functions_that_are_named_are_there() -> None:
    named = set(re.findall(r"`(scaling/[\w/]+\.py):(\w+)`", CONTRIBUTING))
    assert len(named) > 15
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {getattr(node, "name", "") for node in tree.body}, f"{path}:{name}"


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_no_paragraph_is_long(text: str) -> None:
    found = paragraphs(text)
    assert len(found) > 30
    for paragraph in found:
        lines = paragraph.strip("\n").split("\n")
        assert len(lines) <= LINES and max(map(len, lines)) <= CHARACTERS, paragraph


def test_a_long_paragraph_is_found() -> None:
    text = "# A\n\nOne\nTwo\n\n    code\n    more\n\n- item\n  more\n- other\n\n| a |\n| b |\n"
    text += "\n```python\na\n\nb\n```\n"
    assert [p.strip() for p in paragraphs(text)] == ["One\nTwo", "- item\n  more", "- other"]
