"""TimeSformer: counts, how it starts, alone and from a ViT, and other sizes.

Its parity stands with the converter of the format in which the reference is saved, and what it shares with
ViViT in test_video.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling.errors import UserError
from scaling.models import layers, table, timesformer
from tests.support.running import KEY, block_kernels, random_params
from tests.support.video import SMALL, a_vit, check_start, features, videos


@pytest.mark.parametrize(
    ("options", "params_m", "tflops"),
    # Bertasius et al. 2021, comparison on Kinetics 400: 0.59, 5.11 and 7.14 "TFLOPs" (multiply-adds) of three
    # views. The parameters differ by the positions, which are of 28 x 28 patches in HR, of 96 frames in L.
    [({}, 121.57, 0.59), ({"frames": 16, "resolution": 448}, 122.02, 5.11), ({"frames": 96}, 121.63, 7.14)],
)
def test_counts_are_the_papers(options: dict[str, Any], params_m: float, tflops: float) -> None:
    cost = table.cost(timesformer.make("B/16", **options), timesformer.inputs("B/16", **options))
    assert round(cost["params"] / 1e6, 2) == params_m
    assert round(3 * cost["gmacs"] / 1e3, 2) == tflops
    if not options:
        assert cost["gmacs"] == pytest.approx(195.83, abs=0.005)
        assert cost["tokens"] == 8 * 14 * 14


def test_names_shapes_and_start_of_the_parameters() -> None:
    kernels = {"patch/kernel": ((12, 64), 12 + 64), **block_kernels(depth=2, width=64, heads=2)}
    for name, size in list(kernels.items()):
        if "/attention/" in name:
            kernels[name.replace("attention", "temporal_attention")] = size
    zeros = {"token": (1, 64), "temporal_positions": (4, 64), "head/kernel": (64, 7)}
    zeros |= {"blocks/temporal_fc/kernel": (2, 64, 64)}
    model = timesformer.TimeSformer(**{**SMALL, "width": 64})
    check_start(model, kernels, {"positions": (1 + 6, 64)}, zeros)


def test_a_still_video_starts_as_the_vit() -> None:
    vit, vit_params = a_vit()
    model, x = timesformer.TimeSformer(**SMALL), videos()
    still = jnp.tile(x[:, :1], (1, 4, 1, 1, 1))
    start = random_params(model, x)["params"]
    params = timesformer.from_vit(model, start, vit, vit_params)
    expected = features(vit, vit_params, x[:, 0])
    assert_allclose(features(model, params, still), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(features(model, params, x) - expected).max() > 1e-2  # a moving one does not
    jax.tree.map(
        assert_array_equal, params["blocks"]["temporal_attention"], vit_params["blocks"]["attention"]
    )
    jax.tree.map(
        assert_array_equal, params["blocks"]["norm_temporal"], vit_params["blocks"]["norm_attention"]
    )
    jax.tree.map(assert_array_equal, params["head"], start["head"])


def test_another_vit() -> None:
    vit, vit_params = a_vit(pool="mean", resolution=(8, 6))
    model = timesformer.TimeSformer(**SMALL)
    start = random_params(model, videos())["params"]
    params = timesformer.from_vit(model, start, vit, vit_params)
    assert_array_equal(params["token"], start["token"])
    assert_array_equal(params["positions"][:1], start["positions"][:1])
    smaller = layers.resize_positions(vit_params["positions"], (4, 3), (2, 3))
    assert_array_equal(params["positions"][1:], smaller)
    vit, vit_params = a_vit(width=32)
    with pytest.raises(UserError, match=r"vit\.width=32: must be that of TimeSformer, which is 16"):
        timesformer.from_vit(model, start, vit, vit_params)


def test_another_size_resizes_the_tables_and_nothing_else() -> None:
    small = timesformer.TimeSformer(**SMALL)
    params = random_params(small, videos())["params"]
    x = videos(8, 8, 10)
    made = timesformer.TimeSformer(**{**SMALL, "frames": 8, "resolution": (8, 10)})
    table = params["positions"]
    places = layers.resize_positions(table[1:], (2, 3), (4, 5))
    moments = params["temporal_positions"]
    padded = jnp.concatenate(
        [moments[:1], moments, moments[-1:]]
    )  # each moment lies a quarter step to a side
    late = 0.75 * moments + 0.25 * padded[2:]
    early = 0.75 * moments + 0.25 * padded[:-2]
    moments = jnp.stack([early, late], axis=1).reshape(8, 16)
    resized = {**params, "temporal_positions": moments, "positions": jnp.concatenate([table[:1], places])}
    assert_allclose(features(small, params, x), features(made, resized, x), rtol=1e-4, atol=1e-5)
    shapes = jax.eval_shape(made.init, KEY, x)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, resized)


def test_inputs_follow_the_options() -> None:
    assert timesformer.inputs("B/16")["x"].shape == (1, 8, 224, 224, 3)
    assert timesformer.inputs("B/16", frames=16, resolution=448)["x"].shape == (1, 16, 448, 448, 3)
