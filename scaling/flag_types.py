"""Types of the command line's flags, which refuse values that no verb can take."""

import math
import os
from argparse import ArgumentTypeError
from pathlib import Path

LARGEST = 2**31 - 1  # of 32 bits, which whole numbers have on a device
LONGEST_PART = 255  # bytes of a file's name


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: must be a whole number") from None
    if not least <= number <= LARGEST:
        raise ArgumentTypeError(f"{text!r}: must be a whole number from {least} to {LARGEST}")
    return number


def count(text: str) -> int:
    """Returns a number of things, at least 1."""
    return _whole(text, 1)


def from_zero(text: str) -> int:
    """Returns a seed or a step, at least 0."""
    return _whole(text, 0)


def amount(text: str) -> float:
    """Returns a finite number, at least 0.

    Raises:
        ArgumentTypeError: if it is none.
    """
    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: must be a number") from None
    if not math.isfinite(number) or number < 0:
        raise ArgumentTypeError(f"{text!r}: must be a finite number, at least 0")
    return number


def positive(text: str) -> float:
    """Returns a finite number above 0.

    Raises:
        ArgumentTypeError: if it is none.
    """
    number = amount(text)
    if number == 0:
        raise ArgumentTypeError(f"{text!r}: must be above 0")
    return number


def path(text: str) -> Path:
    """Returns the path of a file or a folder.

    Raises:
        ArgumentTypeError: if no file can have it.
    """
    if not text.strip():
        raise ArgumentTypeError(f"{text!r}: must be a path; give the current folder as .")
    if "\0" in text or any(len(os.fsencode(part)) > LONGEST_PART for part in Path(text).parts):
        raise ArgumentTypeError(f"{text[:40]!r}: no file can have this name; give another")
    return Path(text)
