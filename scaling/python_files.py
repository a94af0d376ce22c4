"""Python files of the user's: configs and studies, whose errors name the file and the line."""

import importlib.util
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from scaling.errors import UserError


def load_module(path: Path, key: str) -> ModuleType:
    """Runs a Python file, and returns its module; `key` says what the file is for, in errors.

    Raises:
        UserError: if it cannot be read, is no Python, or fails; the message names the line.
    """
    if path.is_dir() or path.suffix != ".py":
        raise UserError(f"{key}={path}: is no Python file; give one that ends in .py")
    try:
        path.read_bytes().decode()
    except OSError as e:
        raise UserError(f"{key}={path}: cannot be read ({e.strerror}); give access to it") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{key}={path}: is not text in UTF-8 ({e.reason} at byte {e.start})") from None
    spec = importlib.util.spec_from_file_location(f"scaling_{key}_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the suffix is that of Python
    module = importlib.util.module_from_spec(spec)
    with errors_in(path):
        spec.loader.exec_module(module)
    return module


def call(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the value of a function that the file defines.

    Raises:
        UserError: if it fails; the message names the line.
    """
    with errors_in(path):
        return function(*arguments)


@contextmanager
def errors_in(path: Path) -> Iterator[None]:
    """Turns whatever the code of a file raises into a `UserError` that names its line.

    Raises:
        UserError: if the code fails.
    """
    try:
        yield
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except (Exception, SystemExit) as e:
        own = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
        if isinstance(e, SyntaxError) and e.filename == str(path):
            own = [e.lineno]
        line = f", line {own[-1]}" if own and own[-1] else ""
        reason = e.msg if isinstance(e, SyntaxError) else str(e).partition("\n")[0]
        raise UserError(f"{path}{line}: {type(e).__name__}: {reason}") from e
