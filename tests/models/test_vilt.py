"""ViLT: how it starts, what its result does not depend on, its cost, and every way to run its depth."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from scaling.errors import UserError
from scaling.models import table, vilt
from tests.support import running
from tests.support.running import KEY, block_kernels, jit, largest_error, named, random_params, run

ALL = ("itm", "mlm", "mpp", "vqa", "retrieval")  # but nlvr2, which goes with no other
SMALL: dict[str, Any] = dict(
    patch=2, width=16, depth=2, heads=2, vocabulary=20, length=7, tasks=("mpp",), resolution=(4, 6)
)


def examples(length: int = 5) -> dict[str, jax.Array]:
    """Two images of 2 x 3 patches, and texts of 5 and 3 words."""
    rng = np.random.default_rng(0)
    x, text = rng.standard_normal((2, 4, 6, 3)), rng.integers(0, 20, (2, length))
    return {
        "x": jnp.asarray(x, jnp.float32),
        "text": jnp.asarray(text, jnp.int32),
        "mask": jnp.arange(length)[None] < jnp.array([[5], [3]]),
    }


@pytest.fixture(scope="module")
def scanned() -> Any:
    model = vilt.ViLT(**SMALL)
    params = random_params(model, **examples(), scale=0.3)
    return params, *run(model, params, **examples())


@pytest.fixture(scope="module")
def apply(scanned: Any) -> Any:
    """inputs -> outputs of the model with those parameters."""
    forward = jit(vilt.ViLT(**SMALL).apply)
    return lambda **inputs: jax.device_get(forward(scanned[0], **inputs))


def test_names_shapes_and_start_of_the_parameters() -> None:
    model = vilt.make("T/4", depth=1, tasks=ALL, num_classes=200)
    inputs = {name: jnp.zeros(s.shape, s.dtype) for name, s in vilt.inputs("T/4").items()}
    flat = named(jax.device_get(jit(functools.partial(model.init, KEY))(**inputs))["params"])
    xavier = {"image/patch/kernel": ((48, 128), 48 + 128), **block_kernels(depth=1, width=128, heads=16)}
    running.check_xavier(flat, xavier)
    normal = {
        "word/embedding": (2048, 128), "text/positions": (16, 128), "text/segment_embedding": (2, 128),
        "image/positions": (65, 128), "modality_embedding": (2, 128), "pooler/kernel": (128, 128),
        "itm/kernel": (128, 2), "retrieval/kernel": (128, 1),
        "mlm/dense/kernel": (128, 128), "mpp/dense/kernel": (128, 128), "mpp/decoder/kernel": (128, 768),
        "vqa/up/kernel": (128, 256), "vqa/head/kernel": (256, 200),
    }  # fmt: skip
    for name, shape in normal.items():
        assert flat[name].shape == shape
        assert flat[name].std() == pytest.approx(0.02, rel=3 / math.sqrt(math.prod(shape))), name
    norms = (
        "text/norm",
        "blocks/norm_attention",
        "blocks/norm_mlp",
        "norm",
        "mlm/norm",
        "mpp/norm",
        "vqa/norm",
    )
    ones = {f"{name}/scale" for name in norms}
    assert {name for name, leaf in flat.items() if np.all(leaf == 1)} == ones
    kernels = [name for name in flat if name.endswith("kernel")]
    zeros = {name.replace("kernel", "bias") for name in kernels} | {f"{name}/bias" for name in norms}
    zeros |= {"image/token", "image/mask_token", "mlm/bias"}
    assert {name for name, leaf in flat.items() if not np.any(leaf)} == zeros
    assert flat["image/token"].shape == flat["image/mask_token"].shape == (1, 128)
    assert flat["mlm/bias"].shape == (2048,)
    assert set(flat) == {*xavier, *normal, *zeros, *ones}


def test_parameters_and_cost_of_the_published_size() -> None:
    model, inputs = vilt.make("B/32"), vilt.inputs("B/32")
    cost = table.cost(model, inputs)
    shapes = jax.eval_shape(functools.partial(model.init, KEY), **inputs)["params"]
    count = {n: sum(leaf.size for leaf in jax.tree.leaves(tree)) for n, tree in shapes.items()}
    # The paper prints 87.4 M: the image trunk, but for the table of 145 positions that is 0.11 M more.
    trunk = count["image"] + count["blocks"] + count["norm"]
    positions = shapes["image"]["positions"].size
    assert (trunk, positions) == (87_528_192, 145 * 768)
    assert f"{(trunk - positions) / 1e6:.1f}" == "87.4"
    # With the text's embedding, types and pooler 111.6 M.
    text = count["word"] + count["text"]
    assert text == (30_522 + 40 + 2 + 2) * 768
    assert cost["params"] == trunk + text + 2 * 768 + 769 * 768 == 111_595_008
    assert f"{cost['params'] / 1e6:.1f}" == "111.6"

    d, m = 768, 144
    n = 40 + 1 + m
    assert cost["tokens"] == m
    assert round(cost["gmacs"] * 1e9) == 12 * (n * 12 * d**2 + 2 * n**2 * d) + m * 32**2 * 3 * d + d**2


@pytest.mark.parametrize(
    ("tasks", "params"),
    [
        (("itm",), 769 * 2),
        (("mlm",), 769 * 768 + 2 * 768 + 30_522),
        (("mpp",), 768 + 769 * 768 + 2 * 768 + 769 * 768),
        (("vqa",), 769 * 1536 + 2 * 1536 + 1537 * 3129),
        (("retrieval",), 769),
        (("nlvr2",), 768 + 1537 * 1536 + 2 * 1536 + 1537 * 2),  # and a type for the second image
    ],
    ids=str,
)
def test_parameters_of_the_heads(tasks: Any, params: int) -> None:
    inputs = vilt.inputs("B/32", tasks=tasks)
    shapes = jax.eval_shape(functools.partial(vilt.make("B/32", tasks=tasks).init, KEY), **inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 111_595_008 + params


def test_every_form_of_the_depth_gives_the_same(scanned: Any) -> None:
    params, expected, expected_grads = scanned
    out, grads = run(vilt.ViLT(**SMALL, remat="dots", unroll=True), params, **examples())
    assert largest_error(out, expected) < 1e-5
    assert largest_error(grads, expected_grads) < 1e-5


def test_bfloat16_is_close_and_its_outputs_float32(scanned: Any) -> None:
    model = vilt.ViLT(**SMALL, dtype="bfloat16")
    running.check_bfloat16(jit(model.apply)(scanned[0], **examples()), scanned[1])
    shapes = jax.eval_shape(functools.partial(model.clone(tasks=ALL).init_with_output, KEY), **examples())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}


def test_forward_mode_agrees_with_finite_differences(scanned: Any) -> None:
    running.check_forward_mode(vilt.ViLT(**SMALL), scanned[0], step=0.003, **examples())


def words(out: dict[str, np.ndarray], example: int, count: int) -> dict[str, np.ndarray]:
    """The outputs of one example, of its text only the first `count` positions."""
    return {name: each[example][: count if name == "text" else None] for name, each in out.items()}


def test_masked_positions_do_not_count(scanned: Any, apply: Any) -> None:
    inputs, out = examples(), scanned[1]
    other = inputs | {"text": inputs["text"].at[1, 3:].set(jnp.array([19, 0]))}
    expected, changed = words(out, 1, 3), apply(**other)
    for name, each in words(changed, 1, 3).items():
        assert_allclose(each, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert not np.allclose(changed["text"][1, 3:], out["text"][1, 3:])  # the text was another
    seen = apply(**inputs | {"mask": jnp.ones((2, 5), bool)})
    assert not np.allclose(seen["pooled"][1], out["pooled"][1], atol=1e-2)


def test_more_padding_does_not_count(scanned: Any, apply: Any) -> None:
    inputs, out = examples(), scanned[1]
    inputs |= {name: jnp.pad(inputs[name], ((0, 0), (0, 2))) for name in ("text", "mask")}
    padded = apply(**inputs)
    for example, count in ((0, 5), (1, 3)):
        for name, each in words(padded, example, count).items():
            assert_allclose(each, words(out, example, count)[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_rest_of_the_batch_does_not_count(scanned: Any, apply: Any) -> None:
    inputs, out = examples(), scanned[1]
    inputs["x"] = inputs["x"].at[0].set(100.0)
    inputs["text"], inputs["mask"] = inputs["text"].at[0].set(7), inputs["mask"].at[0].set(True)
    turned = apply(**{name: each[::-1] for name, each in inputs.items()})
    for name, each in out.items():
        assert_allclose(turned[name][0], each[1], rtol=1e-5, atol=1e-5, err_msg=name)


def test_hidden_patches_are_not_seen(scanned: Any, apply: Any) -> None:
    inputs = examples()
    hidden = jnp.zeros((2, 6), bool).at[:, 4].set(True)  # second row, second column
    out = apply(**inputs, hidden=hidden)
    painted = inputs | {"x": inputs["x"].at[:, 2:, 2:4].add(3.0)}
    assert largest_error(apply(**painted), scanned[1]) > 0.01
    assert largest_error(out, scanned[1]) > 0.01
    assert largest_error(apply(**painted, hidden=hidden), out) < 1e-5


def test_stochastic_depth_acts_in_training_alone(scanned: Any, apply: Any) -> None:
    model, inputs = vilt.ViLT(**SMALL, drop_path=0.9), examples()
    forward = jit(model.apply, static_argnames="train")
    still = forward(scanned[0], **inputs, train=False)
    assert largest_error(jax.device_get(still), scanned[1]) < 1e-6
    drawn = [
        jax.device_get(forward(scanned[0], **inputs, train=True, rngs={"dropout": jax.random.key(i)}))[
            "pooled"
        ]
        for i in range(6)
    ]
    assert len({leaf.tobytes() for leaf in drawn}) > 1


@pytest.mark.parametrize("new", [(3, 4), (2, 7), (5, 1), (1, 1)], ids=str)
def test_positions_are_interpolated_between_the_corners(new: tuple[int, int]) -> None:
    positions = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
    grid = torch.from_numpy(positions).T.reshape(1, 6, 3, 4)
    expected = torch.nn.functional.interpolate(grid, new, mode="bilinear", align_corners=True)
    out = vilt.resize_positions(jnp.asarray(positions), (3, 4), new)
    assert_allclose(out, expected[0].flatten(1).T.numpy(), rtol=1e-5, atol=1e-6)


def test_inputs_follow_the_options() -> None:
    def shapes(variant: str, **options: Any) -> list[tuple[int, ...]]:
        return [each.shape for each in vilt.inputs(variant, **options).values()]

    assert shapes("B/32") == [(1, 384, 384, 3), (1, 40), (1, 40)]
    assert shapes("T/4") == [(1, 32, 32, 3), (1, 16), (1, 16)]
    assert shapes("B/32", resolution=(384, 640), length=20) == [(1, 384, 640, 3), (1, 20), (1, 20)]
    assert shapes("T/4", tasks=("nlvr2",))[0] == (1, 2, 32, 32, 3)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("L/32", {}, r"variant='L/32': must be SIZE/PATCH with a SIZE of B, A, F, P, T"),
        ("B/32", {"task": "itm"}, r"model\.task: no such key; did you mean model\.tasks\?"),
        ("B/32", {"tasks": ("gqa",)}, r"model\.tasks\[0\]='gqa': must be one of itm, mlm, mpp, vqa"),
        ("B/32", {"length": 0}, r"model\.length=0: must be positive"),
    ],
)  # fmt: skip
def test_bad_options_are_named(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vilt.make(variant, **options)


@pytest.mark.parametrize(
    ("options", "shapes", "message"),
    [
        ({"patch": 3}, {}, "patch=3: must divide the input's height and width, which are 32x32"),
        ({"resolution": 30}, {}, "patch=4: must divide the input's height and width, which are 30x30"),
        ({"heads": 5}, {}, "heads=5: must divide the width, which is 128"),
        ({"length": 15}, {}, "length=15: must be at least the text's, which is 16"),
        ({"tasks": ("nlvr2", "itm")}, {}, "tasks=nlvr2,itm: nlvr2 reads two images; leave the other"),
        ({"tasks": ("nlvr2",)}, {}, r"tasks=nlvr2: images must be \[B, 2, H, W, C\], and are \[1, 32"),
        ({}, {"x": (1, 2, 32, 32, 3)}, r"tasks=\(\): images must be \[B, H, W, C\], and are \[1, 2"),
        ({"tasks": ("itm",)}, {"hidden": (1, 64)}, "tasks=itm: must have mpp where patches are hidden"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_found_without_compiling(
    options: dict[str, Any], shapes: dict[str, Any], message: str
) -> None:
    model = vilt.make("T/4", **options)
    inputs = vilt.inputs("T/4") | {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    with pytest.raises(UserError, match=message):
        jax.eval_shape(functools.partial(model.init, KEY), **inputs)
