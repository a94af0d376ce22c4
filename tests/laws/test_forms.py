"""Each form's curve is its formula, and its prior covers what it should."""

from collections.abc import Callable

import numpy as np
import pytest

from scaling.laws.forms import FORMS, Range

X = {1: np.geomspace(1, 100, 9)[:, None]}
X[2] = np.stack([np.tile(np.geomspace(1, 80, 3), 3), np.repeat(np.geomspace(1, 16, 3), 3)], 1)
X[3] = np.concatenate([X[2], np.full((9, 1), 5.0)], 1)


def _formula(p: dict[str, float], x: np.ndarray) -> np.ndarray:
    return p["E"] + p["A"] * x[:, 0] ** -p["alpha"]


def _saturating(p: dict[str, float], x: np.ndarray) -> np.ndarray:
    q = p["A"] * x[:, 0] ** -p["alpha"]
    return (p["E"] + p["C"] * q) / (1 + q)


def _joint(p: dict[str, float], x: np.ndarray) -> np.ndarray:
    return _formula(p, x) + p["B"] * x[:, 1] ** -p["beta"]


def _repeated(p: dict[str, float], x: np.ndarray) -> np.ndarray:
    unique = np.minimum(x[:, 1], x[:, 2])
    again = np.maximum(x[:, 1] / x[:, 2] - 1, 0)
    worth = unique + unique * p["repeats"] * (1 - np.exp(-again / p["repeats"]))
    return _joint(p, np.stack([x[:, 0], worth], 1))


FORMULAS: dict[str, Callable[[dict[str, float], np.ndarray], np.ndarray]] = {
    "power": _formula, "saturating": _saturating, "joint": _joint, "repeated": _repeated,
}  # fmt: skip


def _span(columns: int, ceiling: float | None = None) -> Range:
    return Range.of(X[columns], np.linspace(2, 1, 9), ceiling)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_curve_is_its_formula(name: str) -> None:
    form = FORMS[name]
    span = _span(form.columns)
    parameters = form.parameters(np.random.default_rng(0).normal(size=(20, form.dims)), span)
    curves = np.exp(form.curve(parameters, np.log(X[form.columns]), span))
    for i, curve in enumerate(curves):
        p = {k.removeprefix("log_"): np.exp(v[i]) if "log_" in k else v[i] for k, v in parameters.items()}
        np.testing.assert_allclose(curve, FORMULAS[name](p, X[form.columns]), rtol=1e-6)


def test_a_broken_law_has_its_two_exponents_far_from_the_break() -> None:
    form, span = FORMS["broken"], _span(1)
    p = form.parameters(np.array([[0.0, 0.0, -3.0, 0.3, 1.0]]), span)
    far = np.array([[-30.0], [-29.0], [30.0], [31.0]])  # log x
    (curve,) = form.curve(p, far, span)
    assert curve[0] - curve[1] == pytest.approx(p["alpha"][0])
    assert curve[2] - curve[3] == pytest.approx(p["alpha_after"][0])
    assert p["alpha_after"][0] != pytest.approx(p["alpha"][0])


def test_a_surface_falls_by_its_exponents_at_its_centre() -> None:
    form, span = FORMS["surface"], _span(2)
    p = form.parameters(np.array([[0.0, 0.5, -0.5, 1.0]]), span)
    centre = (span.largest + span.smallest) / 2
    step = 1e-6
    places = centre + np.array([[0, 0], [step, 0], [0, step]])
    (curve,) = form.curve(p, places, span)
    assert (curve[0] - curve[1:]) / step == pytest.approx([p["alpha"][0], p["beta"][0]], rel=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_before_any_value_y_is_of_the_values_order_and_exponents_are_usual(name: str) -> None:
    form = FORMS[name]
    span = _span(form.columns)
    z = np.random.default_rng(0).normal(size=(4000, form.dims))
    parameters = form.parameters(z, span)
    curve = form.curve(parameters, np.log(X[form.columns]), span)
    assert np.isfinite(curve).all()
    assert np.median(parameters["alpha"]) == pytest.approx(0.4, rel=0.05)
    assert abs(np.median(curve[:, 4]) - span.level) < 1.5
    if "log_E" in parameters and form.columns == 1:
        none = parameters["log_E"] < -600
        assert none.mean() == pytest.approx(0.25, abs=0.03)


def test_a_ceiling_that_is_known_is_kept() -> None:
    form, span = FORMS["saturating"], _span(1, 2.5)
    z = np.random.default_rng(0).normal(size=(500, form.dims))
    curve = form.curve(form.parameters(z, span), np.array([[-400.0], [0.0]]), span)
    assert np.exp(curve).max() <= 2.5 * (1 + 1e-9)
    assert np.median(np.exp(curve[:, 0])) == pytest.approx(2.5, rel=0.01)
