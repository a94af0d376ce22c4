"""Errors whose message is written for the user to read."""

import re

# Controls of both sets and Unicode's two ends of lines: they end a line, or steer a terminal. Lone surrogates
# stand for bytes of names that are not UTF-8, and no file or pipe takes them.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """Returns the text with an escape for each character that ends a line, or that cannot be written.

    Names in files from elsewhere may hold any: those of tensors, of members of archives, of JSON's fields.
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """Bad input: one line that names the key or file, the value, and what to do.

    The command line prints it as `error: …` and exits with 2; everything else is a bug and
    keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class NotFinite(UserError):
    """A metric that cannot be measured, because numbers it is computed from are not finite."""
