"""The kinds of metrics, by their names: what their values mean to a law."""

import re

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
