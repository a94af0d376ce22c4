"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Bad input: one line that names the key or file, the value, and what to do.

    The command line prints it as `error: …` and exits with 2; everything else is a bug and
    keeps its traceback.
    """


class NotFinite(UserError):
    """A metric cannot be measured, because numbers that it is of are not finite."""
