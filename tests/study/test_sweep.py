"""Combinators, run names and study files."""

from pathlib import Path
from typing import Any

import pytest

from scaling.errors import UserError
from scaling.study.sweep import Study, chain, load, product, run_names, zip_

ROOT = Path(__file__).parents[2]


def test_product_varies_the_last_name_fastest() -> None:
    assert product({"a.x": [1, 2], "a.y": ["u", "v"]}) == [
        {"a.x": 1, "a.y": "u"}, {"a.x": 1, "a.y": "v"}, {"a.x": 2, "a.y": "u"}, {"a.x": 2, "a.y": "v"},
    ]  # fmt: skip


def test_combinators_nest() -> None:
    pairs = zip_({"m.width": [16, 32], "o.rate": [0.1, 0.2]})
    assert pairs == [{"m.width": 16, "o.rate": 0.1}, {"m.width": 32, "o.rate": 0.2}]
    assert product(pairs, {"t.seed": [0, 1]})[1] == {"m.width": 16, "o.rate": 0.1, "t.seed": 1}
    assert chain(pairs, {"t.seed": [0, 1]}) == [*pairs, {"t.seed": 0}, {"t.seed": 1}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zip_({"a.x": [1, 2], "a.y": [1]}), "a.x has 2, a.y has 1"),
        (lambda: product({"a.x": [1]}, {"a.x": [2]}), "a.x: is set twice"),
        (lambda: product({"a.x": [1, 1]}), "a.x=1: comes twice"),
        (lambda: chain([{"a.x": 1}], {"a.x": [1]}), "a.x=1: comes twice"),
        (lambda: product({"a.x": "abc"}), "a.x='abc': must be a list"),
        (lambda: product({"a.x": 3}), "a.x=3: must be a list"),
    ],
)
def test_bad_sweeps(make: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)


def test_names_are_readable_safe_and_stable() -> None:
    runs = product({"train.seed": [0, 1], "model.variant": ["F/7", "N/4"]})
    assert run_names(runs)[:2] == ["variant=F-7_seed=0", "variant=N-4_seed=0"]
    grown = chain(runs, {"optimizer.learning_rate": [3e-4]})
    assert run_names(grown)[:4] == run_names(runs)
    assert run_names(
        [{"a.shape": (4, 2), "a.note": "x y:z", "a.on": True, "b.none": None, "b.text": ""}]
    ) == ["shape=4x2_note=x-y-z_on=True_none=None_text=empty"]
    assert run_names([{}]) == ["base"]


def test_names_fall_back_to_dotted_ones() -> None:
    assert run_names([{"model.width": 8, "data.width": 9}]) == ["model.width=8_data.width=9"]
    assert run_names([{"model.width": 8}, {"data.width": 8}]) == ["width=8", "data.width=8"]
    with pytest.raises(UserError, match="same folder name"):
        run_names([{"a.x": "1/2"}, {"a.x": "1-2"}, {"a.x": "1:2"}])


def test_long_names_are_cut_and_differ() -> None:
    names = run_names([{"a.text": "x" * 300 + tail} for tail in "ab"])
    assert len(set(names)) == 2
    assert max(map(len, names)) <= 120


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"name": "a b"}, "name='a b'"),
        ({"sweep": []}, "sweep is empty"),
        ({"sweep": [{"seed": 1}]}, "'seed': must be a dotted config name"),
        ({"sweep": [{"a.x": [1]}]}, "a.x=[1]: must be a number"),
        ({"sweep": [{"a.x": 1}, {"a.x": 1}]}, "comes twice"),
        (
            {"config": {"vit": "v.py"}},
            "model.name=None: must in every run be one of vit, which have a config",
        ),
        (
            {"config": {"vit": "v.py"}, "sweep": [{"model.name": "dit"}]},
            "model.name='dit': must in every run",
        ),
    ],
)
def test_bad_studies(field: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"name": "s", "config": "c.py", "sweep": [{}], "metric": "fd"}
    with pytest.raises(UserError) as caught:
        Study(**{**good, **field})
    assert message in str(caught.value)


def test_each_family_may_have_a_config_of_its_own() -> None:
    runs = product({"model.name": ["vit", "swin"], "train.seed": [0, 1]})
    study = Study("s", {"vit": "v.py", "swin": "s.py:T"}, runs, "top1")
    assert [study.config_of(run) for run in study.sweep] == ["v.py", "v.py", "s.py:T", "s.py:T"]
    assert list(study.runs())[2] == "name=swin_seed=0"
    assert Study("s", "c.py", runs, "top1").config_of(runs[2]) == "c.py"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "no such study"),
        ("x = 1\n", "must define STUDY"),
        ("x = 1\n1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("x = 1\ndef (\n", "line 2: SyntaxError"),
        ("from scaling.study.sweep import product\nproduct({'a.x': [1, 1]})\n", "a.x=1: comes twice"),
    ],
)
def test_bad_study_files(tmp_path: Path, code: str | None, message: str) -> None:
    if code is not None:
        (tmp_path / "study.py").write_text(code)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


STUDIES = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/study.py"))
METRICS = {  # of each study that ships; those of LOWER are better where they are lower
    "clip": "val_i2t_r1", "imagenet_classifiers": "val_top1", "kinetics_vivit": "val_top1",
    "mnist_classifiers": "val_top1", "mnist_dit": "fd_mnist", "mnist_vit": "val_top1",
    "mup": "fixed_loss",
    "moving_mnist": "val_motion", "openmoji_clip": "val_i2t_r1", "openmoji_vilt": "val_itm_accuracy",
    "vilt": "val_itm_accuracy",
}  # fmt: skip
LOWER = {"fd_mnist", "fixed_loss"}


@pytest.mark.parametrize("name", STUDIES)
def test_the_projects_studies(name: str) -> None:
    study = load(ROOT / "experiments" / name)
    assert load(ROOT / "experiments" / name / "study.py") == study
    metric = study.measure
    assert (study.name, metric.name, metric.lower) == (name, METRICS[name], METRICS[name] in LOWER)
    for overrides in study.sweep:
        assert (ROOT / study.config_of(overrides).partition(":")[0]).parent.name == "configs"
    assert len(study.runs()) >= 9
