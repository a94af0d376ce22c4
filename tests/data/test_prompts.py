import pytest

from scaling.data.prompts import prompts
from scaling.errors import UserError


def test_imagenet_has_80_templates_of_1000_classes() -> None:
    found = prompts("imagenet", "imagenet")
    assert len(found) == 1000 and {len(forms) for forms in found} == {80}
    assert len({form for forms in found[:3] for form in forms}) == 240
    assert "a photo of the hard to see goldfish." in found[1] and "itap of my toilet paper." in found[999]
    assert "{}" not in "".join(found[500])


def test_own_classes_and_templates() -> None:
    assert prompts(["a cat", "{}"], "plain") == [["a cat"], ["{}"]]
    assert prompts(("red", "blue"), ("{} fox", "the {} owl")) == [
        ["red fox", "the red owl"],
        ["blue fox", "the blue owl"],
    ]


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ("cifar", "plain", "classes='cifar': must be one of imagenet, or the classes themselves"),
        (["a"], "fancy", "templates='fancy': must be one of plain, imagenet, or the templates themselves"),
        (["a"], ["a photo"], r"templates: 'a photo' must have one \{\}, where the class goes"),
        (["a"], ["{} and {}"], "must have one"),
        ([], "plain", r"classes=\[\]: must have at least one"),
        (["a"], [], r"templates=\[\]: must have at least one"),
        (["a", " "], "plain", "classes: one has no name"),
    ],
)
def test_bad_lists_are_named(classes: object, templates: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompts(classes, templates)  # type: ignore[arg-type]
