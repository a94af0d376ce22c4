"""What both video families do alike: the ways to run them, and what they refuse."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling.errors import UserError
from scaling.models import timesformer, vivit
from tests.support import running
from tests.support.running import KEY, jit, largest_error, random_params, run
from tests.support.video import SMALL, features, videos

DIVIDED = timesformer.TimeSformer(**SMALL)
ENCODER, SELF, DOT = (
    vivit.ViViT(**SMALL, temporal_depth=2, attention=attention)
    for attention in ("factorised-encoder", "factorised-self-attention", "factorised-dot-product")
)


def name(model: nn.Module) -> str:
    return getattr(model, "attention", "divided")


@pytest.fixture(scope="module", params=[DIVIDED, ENCODER, SELF, DOT], ids=name)
def scanned(request: Any) -> Any:
    """A model, random parameters, a video, and the logits."""
    model, x = request.param, videos()
    params = random_params(model, x)
    return model, params, x, np.asarray(jit(model.apply)(params, x))


def test_the_depth_unrolled_gives_the_same(scanned: Any) -> None:
    model, params, x, expected = scanned
    out = np.asarray(jit(model.clone(unroll=True).apply)(params, x))
    assert largest_error(out, expected) < 1e-5


@pytest.mark.parametrize("model", [DIVIDED, SELF.clone(activation="gelu")], ids=name)
def test_gradients_are_the_same_recomputed_and_unrolled(model: Any) -> None:
    x = videos()
    params = random_params(model, x)
    expected, expected_grads = run(model, params, x)
    out, grads = run(model.clone(remat="full", unroll=True), params, x)
    assert largest_error(out, expected) < 1e-5
    assert largest_error(grads, expected_grads) < 1e-5


def test_bfloat16_is_close_and_its_logits_float32(scanned: Any) -> None:
    model, params, x, expected = scanned
    running.check_bfloat16(jit(model.clone(dtype="bfloat16").apply)(params, x), expected)


@pytest.mark.parametrize("model", [DIVIDED, DOT], ids=name)
def test_forward_mode_agrees_with_finite_differences(model: Any) -> None:
    running.check_forward_mode(model, random_params(model, videos()), videos(), within=5e-3)


def test_logits_are_a_linear_function_of_the_features(scanned: Any) -> None:
    model, params, x, logits = scanned
    pooled = features(model, params["params"], x)
    assert pooled.shape == (2, 16)
    head = jax.device_get(params["params"]["head"])
    assert_allclose(pooled @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_acts_in_training_alone(scanned: Any) -> None:
    model, params, x, expected = scanned
    model = model.clone(drop_path=0.5)
    jax.eval_shape(model.apply, params, x)  # draws nothing: there is nothing to draw from
    train = jit(lambda key: model.apply(params, x, train=True, rngs={"dropout": key}))
    one, again, other = (np.asarray(train(jax.random.key(seed))) for seed in (0, 0, 1))
    assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("family", "variant", "options", "message"),
    [
        (timesformer, "L/16", {}, "variant='L/16': must be SIZE/PATCH with a SIZE of B"),
        (timesformer, "B/16", {"frame": 8}, r"model\.frame: no such key; did you mean model\.frames\?"),
        (timesformer, "B/16", {"remat": "all"}, r"model\.remat='all': must be one of none, full, dots"),
        (vivit, "H/16x2", {}, "variant='H/16x2': must be SIZE/PATCHxTUBELET with a SIZE of B, L"),
        (vivit, "B/16", {}, "variant='B/16': must be SIZE/PATCHxTUBELET"),
        (vivit, "B/16x0", {}, "variant='B/16x0': must be SIZE/PATCHxTUBELET"),
        (vivit, "B/16x2", {"attention": "divided"}, r"model\.attention='divided': must be one of joint, fac"),
        (vivit, "B/16x2", {"frame": 8}, r"model\.frame: no such key; did you mean model\.frames\?"),
    ],
)
def test_bad_options_are_named(family: Any, variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        family.make(variant, **options)


SIDES = "patch=15: must divide the input's height and width, which are 224x224"


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (timesformer, {"patch": 15}, SIDES),
        (timesformer, {"heads": 5}, "heads=5: must divide the width, which is 768"),
        (vivit, {"tubelet": 3}, "tubelet=3: must divide the input's number of frames, which is 32"),
        (vivit, {"patch": 15}, SIDES),
        (vivit, {"heads": 5}, "heads=5: must divide the width, which is 768"),
        (
            vivit,
            {"heads": 3, "attention": "factorised-dot-product"},
            "heads=3: must be even, as half of them",
        ),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(
    family: Any, options: dict[str, Any], message: str
) -> None:
    variant = family.VARIANTS[0][0]
    with pytest.raises(UserError, match=message):
        jax.eval_shape(family.make(variant, **options).init, KEY, **family.inputs(variant))
