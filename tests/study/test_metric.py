"""Metrics: what their names say, and the y of their laws."""

import pytest

from scaling.errors import UserError
from scaling.study.metric import Metric, metric_of


@pytest.mark.parametrize(
    ("name", "kind", "lower"),
    [
        ("fd_mnist", "distance", True), ("fid", "distance", True), ("val_top1", "share", False),
        ("val_itm_accuracy", "share", False), ("val_i2t_r1", "share", False), ("val_loss", "loss", True),
        ("fixed_loss", "loss", True), ("fixed_loss_t3", "loss", True), ("val_psnr", "score", False),
    ],
)  # fmt: skip
def test_a_name_says_the_kind(name: str, kind: str, lower: bool) -> None:
    metric = Metric(name)
    assert (metric.kind, metric.lower) == (kind, lower)
    assert metric_of(metric.as_json()) == metric


@pytest.mark.parametrize(
    ("metric", "label", "value", "y"),
    [
        (Metric("fd_mnist"), "fd_mnist", 8.0, 8.0),
        (Metric("val_top1"), "1 - val_top1", 0.9, 0.1),
        (Metric("val_psnr"), "1 / val_psnr", 20.0, 0.05),
        (Metric("val_psnr", floor=60.0), "60 - val_psnr", 20.0, 40.0),
        (Metric("val_loss", floor=-3.0), "val_loss + 3", -2.0, 1.0),
        (Metric("val_loss", floor=0.5), "val_loss", 2.0, 2.0),
    ],
)
def test_y_is_lower_where_the_metric_is_better(metric: Metric, label: str, value: float, y: float) -> None:
    assert metric.label == label
    assert metric.y(value) == pytest.approx(y) and metric.value(metric.y(value)) == pytest.approx(value)
    better = value - 0.01 if metric.lower else value + 0.01
    slope = (metric.y(better) - metric.y(value)) / 0.01
    assert slope < 0
    assert metric.error(value, 0.01) == pytest.approx(-slope * 0.01, rel=1e-3)


def test_what_is_known_of_a_metric_is_known_of_y() -> None:
    top1 = Metric("val_top1", chance=0.1, floor=0.98)
    assert (top1.y_chance, top1.y_floor) == (pytest.approx(0.9), pytest.approx(0.02))
    loss = Metric("val_loss", chance=2.3, floor=0.5)
    assert (loss.y_chance, loss.y_floor) == (2.3, 0.5)
    assert Metric("val_loss", floor=-3.0).y_floor is None and Metric("val_top1").y_floor is None


def test_older_studies_say_the_direction() -> None:
    assert metric_of("unheard_of", False).as_json() == {
        "name": "unheard_of", "kind": "share", "chance": None, "floor": None, "direction": "higher",
    }  # fmt: skip
    assert metric_of("unheard_of", True).kind == "loss"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (
            ("unheard_of",),
            r"metric 'unheard_of': give its kind, Metric\('unheard_of', kind=\.\.\.\), one of ",
        ),
        (("x", "sum"), r"metric 'x': kind='sum': must be one of loss, share, distance, score"),
        (("x", "loss", None, None, "up"), r"direction='up': must be one of lower, higher"),
        (("x", "share", 10.0), r"chance=10.0: is a share, between 0 and 1"),
        (("x", "loss", float("nan")), r"chance=nan: must be a finite number"),
        (("x", "loss", 0.1, 0.5), r"chance=0.1: must be worse than floor=0.5"),
    ],
)
def test_what_contradicts_itself_is_one_line(values: tuple, error: str) -> None:
    with pytest.raises(UserError, match=error):
        Metric(*values)
