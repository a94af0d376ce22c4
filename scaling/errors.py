"""Errors whose message is written for the user to read."""


class UserError(Exception):
    """Bad input: one line that names the key or file, the value, and what to do.

    The command line prints it as `error: …` and exits with 2; everything else is a bug and
    keeps its traceback.
    """


class NotFinite(UserError):
    """A metric that cannot be measured, because numbers it is computed from are not finite."""
