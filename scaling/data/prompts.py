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
    """Returns for each class the list of its name in every template.

    `classes` and `templates` are the names of lists that the package has (`CLASSES`, `TEMPLATES`), or the
    texts themselves.

    Raises:
        UserError: if there is no such list, a list is empty, a class has no name, or a template does not
            have exactly one place for the class.
    """
    names = _read_list(classes, "classes", CLASSES) if isinstance(classes, str) else list(classes)
    if templates == "plain":
        forms = ["{}"]
    else:
        forms = (
            _read_list(templates, "templates", TEMPLATES) if isinstance(templates, str) else list(templates)
        )
    for key, texts in (("classes", names), ("templates", forms)):
        if not texts:
            raise UserError(f"{key}={texts!r}: must have at least one")
    for form in forms:
        if form.count("{}") != 1:
            raise UserError(f"templates: {form!r} must have one {{}}, where the class goes")
    if not all(name.strip() for name in names):
        raise UserError("classes: one has no name; give each its own")
    return [[form.replace("{}", name) for form in forms] for name in names]


def _read_list(name: str, key: str, choices: Sequence[str]) -> list[str]:
    """Returns the lines of a list that comes with the package; `key` is "classes" or "templates"."""
    if name not in choices:
        raise UserError(f"{key}={name!r}: must be one of {', '.join(choices)}, or the {key} themselves")
    return (LISTS / f"{name}_{key}.txt").read_text(encoding="utf-8").splitlines()
