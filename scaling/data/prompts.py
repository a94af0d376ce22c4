"""Captions that name a class, for zero-shot classification.

The lists under `lists/` are those of CLIP (Radford et al. 2021, section 3.1.4; MIT licence): its names of
ImageNet's 1,000 classes in their usual order, and the 80 templates that its ImageNet figures average over.
"""

from collections.abc import Sequence
from pathlib import Path

from scaling.errors import UserError

LISTS = Path(__file__).parent / "lists"
CLASSES = ("imagenet",)
TEMPLATES = ("plain", "imagenet")


def prompts(classes: str | Sequence[str], templates: str | Sequence[str]) -> list[list[str]]:
    """For each class, its name in every template.

    Raises: UserError for a list that is not there or empty, and a template without a place for the class.
    """
    names = _lines(classes, "classes", CLASSES) if isinstance(classes, str) else list(classes)
    if templates == "plain":
        forms = ["{}"]
    else:
        forms = _lines(templates, "templates", TEMPLATES) if isinstance(templates, str) else list(templates)
    for key, given in (("classes", names), ("templates", forms)):
        if not given:
            raise UserError(f"{key}={given!r}: must have at least one")
    for form in forms:
        if form.count("{}") != 1:
            raise UserError(f"templates: {form!r} must have one {{}}, where the class goes")
    if not all(name.strip() for name in names):
        raise UserError("classes: one has no name; give each its own")
    return [[form.replace("{}", name) for form in forms] for name in names]


def _lines(name: str, key: str, known: Sequence[str]) -> list[str]:
    if name not in known:
        raise UserError(f"{key}={name!r}: must be one of {', '.join(known)}, or the {key} themselves")
    return (LISTS / f"{name}_{key}.txt").read_text(encoding="utf-8").splitlines()
