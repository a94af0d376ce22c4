"""The kinds of metrics, by their names: what their values mean to a law."""

import math
import re
from collections.abc import Iterable, Mapping

KINDS = ("loss", "share", "distance", "score")
HIGHER = ("share", "score")  # kinds that are better the higher they are, unless a study says otherwise

KNOWN = {  # kind -> names of metrics, with or without an evaluator's name before them
    "share": r"(.+_)?(top\d+|accuracy|r\d+|item|motion|precision|recall)",
    "distance": r"s?fid|fd(_.+)?|.+_(s?fid|fd)",
    "loss": r"(.+_)?(loss(_t\d+)?|itm|mlm|mse|vb|l1)",
    "score": r"(.+_)?(inception_score|psnr|clip_score)",
}
STANDARD_ERROR, FLOOR = "_se", "_floor"  # ends of the names of what is known about another metric


def kind_of(name: str) -> str | None:
    """Returns the kind of a metric, one of `KINDS`; None if its name says nothing."""
    return next((kind for kind, names in KNOWN.items() if re.fullmatch(names, name)), None)


def with_error_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of metrics and, after each share, that of its standard error."""
    return tuple(
        each for name in names for each in ((name, f"{name}{STANDARD_ERROR}") if _is_share(name) else (name,))
    )


def with_errors(values: Mapping[str, float], counts: float | Mapping[str, float]) -> dict[str, float]:
    """Returns the values and, after each share of so many examples, its standard error, the binomial one."""
    both: dict[str, float] = {}
    for name, value in values.items():
        both[name] = value
        if _is_share(name):
            count = counts if isinstance(counts, int | float) else counts[name]
            both[f"{name}{STANDARD_ERROR}"] = math.sqrt(max(value * (1 - value), 0.0) / count)
    return both


def _is_share(name: str) -> bool:
    return kind_of(name) == "share"
