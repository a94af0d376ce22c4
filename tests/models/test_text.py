"""Text encoders: T5 against transformers, its buckets and masks; CLIP's causal transformer on its own."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from scaling.convert.huggingface import t5 as huggingface_t5
from scaling.errors import UserError
from scaling.models import t5, table
from scaling.models.text import TextTransformer, end_of_text
from tests.support import parity, running
from tests.support.running import KEY, jit, largest_error, named, random_params, run

Tree = dict[str, Any]
SMALL: Tree = {
    "width": 24, "depth": 2, "heads": 2, "head_width": 8, "mlp_width": 40, "vocabulary": 50,
    "buckets": 8, "max_distance": 20,
}  # fmt: skip


def texts(vocabulary: int = 50, length: int = 24) -> Tree:
    """Two texts, one of them shorter."""
    text = np.random.default_rng(0).integers(0, vocabulary, (2, length)).astype(np.int32)
    return {"text": text, "mask": np.arange(length)[None, :] < np.array([[length], [length - 5]])}


# T5


def compare(model: t5.T5Encoder, reference: T5EncoderModel, inputs: Tree) -> None:
    mask = torch.from_numpy(inputs["mask"])
    ids = torch.from_numpy(inputs["text"]).long()
    out = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    out = torch.where(mask[:, :, None], out, 0)  # at padding transformers leaves what nobody reads
    parity.compare(model, huggingface_t5.table(model), inputs, reference, out)


def reference_of(model: t5.T5Encoder) -> T5EncoderModel:
    made = T5Config(**huggingface_t5.config(model, {}))
    return T5EncoderModel._from_config(made, attn_implementation="eager").eval()


def test_t5_against_transformers() -> None:
    model = t5.T5Encoder(**SMALL, epsilon=1e-3)
    reference = reference_of(model).double()
    parity.randomise(reference, 0.5)  # enough for the forms of GELU to differ
    compare(model, reference, texts())


@pytest.mark.slow
def test_t5_small_against_transformers() -> None:
    model = t5.make("Small")
    torch.manual_seed(0)
    reference = reference_of(model)
    parity.randomise(reference, 0.03, kept=1)
    compare(model, reference, texts(32128, 200))


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (64, 256)])
def test_buckets_of_relative_positions(buckets: int, max_distance: int) -> None:
    ours = t5.relative_buckets(512, buckets, max_distance)
    offset = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    theirs = T5Attention._relative_position_bucket(offset, True, buckets, max_distance)
    assert np.array_equal(ours, theirs.numpy())
    assert set(ours.ravel()) == set(range(buckets)) - {buckets // 2}  # no key is at once 0 away and after


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(t5.T5Encoder(**SMALL), **texts())


@pytest.fixture(scope="module")
def apply() -> Any:
    return jit(t5.T5Encoder(**SMALL).apply)


def test_what_stands_at_padding_has_no_influence(params: Any, apply: Any) -> None:
    text, mask = texts().values()
    out = np.asarray(apply(params, text, mask))
    other = np.where(mask, text, (text + 7) % 50)
    assert np.array_equal(np.asarray(apply(params, other, mask)), out)
    assert not np.any(out[~mask])
    assert np.abs(out[mask]).min(axis=-1).max() > 0
    short = text[1:, :19]
    alone = jit(t5.T5Encoder(**SMALL).apply)(params, short, np.ones_like(short, bool))
    assert_allclose(out[1, :19], alone[0], rtol=1e-4, atol=1e-5)
    assert largest_error(np.asarray(apply(params, text, np.ones_like(mask)))[1, :19], out[1, :19]) > 0.01


def test_a_text_of_padding_alone_is_zero(params: Any, apply: Any) -> None:
    text, mask = texts().values()
    out = np.asarray(apply(params, text, np.zeros_like(mask)))
    assert not np.any(out)


@pytest.fixture(scope="module")
def scanned(params: Any) -> Any:
    return run(t5.T5Encoder(**SMALL), params, **texts())


def test_every_form_of_the_depth_gives_the_same(params: Any, scanned: Any) -> None:
    out, grads = run(t5.T5Encoder(**SMALL, unroll=True, remat="full"), params, **texts())
    assert largest_error(out, scanned[0]) < 1e-5
    assert largest_error(grads, scanned[1]) < 1e-5


def test_bfloat16_is_close_and_its_output_float32(params: Any, scanned: Any) -> None:
    running.check_bfloat16(jit(t5.T5Encoder(**SMALL, dtype="bfloat16").apply)(params, **texts()), scanned[0])


def test_forward_mode_agrees_with_finite_differences(params: Any) -> None:
    running.check_forward_mode(t5.T5Encoder(**SMALL), params, step=0.005, **texts())


def test_names_shapes_and_start_of_the_parameters() -> None:
    options = SMALL | {"width": 64, "mlp_width": 96, "vocabulary": 300, "depth": 4}
    flat = named(jax.device_get(jit(t5.T5Encoder(**options).init)(KEY, **texts()))["params"])
    expected = {  # shape and deviation
        "tokens/embedding": ((300, 64), 1.0),
        "relative_bias": ((8, 2), 64**-0.5),
        "blocks/attention/query/kernel": ((4, 64, 2, 8), (64 * 8) ** -0.5),
        "blocks/attention/key/kernel": ((4, 64, 2, 8), 64**-0.5),
        "blocks/attention/value/kernel": ((4, 64, 2, 8), 64**-0.5),
        "blocks/attention/out/kernel": ((4, 2, 8, 64), 16**-0.5),
        "blocks/mlp/gate/kernel": ((4, 64, 96), 64**-0.5),
        "blocks/mlp/up/kernel": ((4, 64, 96), 64**-0.5),
        "blocks/mlp/down/kernel": ((4, 96, 64), 96**-0.5),
    }
    for name, (shape, std) in expected.items():
        assert flat[name].shape == shape
        assert flat[name].std() == pytest.approx(std, rel=4 / math.sqrt(flat[name].size)), name
    ones = {"norm/scale": (64,), "blocks/norm_attention/scale": (4, 64), "blocks/norm_mlp/scale": (4, 64)}
    assert {name: leaf.shape for name, leaf in flat.items() if np.all(leaf == 1)} == ones
    assert set(flat) == {*expected, *ones}


@pytest.mark.parametrize(("variant", "rows"), [("Small", 512), ("Base", 768), ("XXL", 4096)])
def test_counts_by_formula(variant: str, rows: int) -> None:
    size, n, inner = t5.SIZES[variant], 512, t5.SIZES[variant].heads * 64
    d, h = size.width, size.mlp_width
    cost = table.cost(t5.make(variant), t5.inputs(variant))
    assert d == rows
    assert cost["tokens"] == n
    kernels = 4 * d * inner + 3 * d * h
    assert cost["params"] == 32128 * d + 32 * size.heads + size.depth * (kernels + 2 * d) + d
    assert round(cost["gmacs"] * 1e9) == size.depth * (n * kernels + 2 * n * n * inner)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("Large", {}, "variant='Large': must be one of Small, Base, XXL"),
        ("Small", {"dept": 3}, r"model\.dept: no such key; did you mean model\.depth\?"),
        ("Small", {"heads": 0}, r"model\.heads=0: must be positive"),
    ],
)
def test_bad_options_are_named(variant: str, options: Tree, message: str) -> None:
    with pytest.raises(UserError, match=message):
        t5.make(variant, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": 6}, "buckets=6: must be a multiple of 4"),
        ({"max_distance": 8}, "max_distance=8: must be greater than 8"),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(options: Tree, message: str) -> None:
    with pytest.raises(UserError, match=message):
        jax.eval_shape(t5.make("Small", **options).init, KEY, **t5.inputs("Small"))


def test_a_mask_of_another_shape_is_refused() -> None:
    text, mask = texts().values()
    with pytest.raises(UserError, match=r"mask: its shape \(2, 23\) must be that of the text, \(2, 24\)"):
        jax.eval_shape(t5.T5Encoder(**SMALL).init, KEY, text, mask[:, 1:])


# CLIP's text transformer; its parity is in test_clip.py


@pytest.fixture(scope="module")
def causal() -> Any:
    """A function of texts, and its shape."""
    model = TextTransformer(width=16, depth=2, heads=2, vocabulary=50, context=10)
    params = random_params(model, texts(length=10)["text"], scale=0.5)
    return functools.partial(jit(model.apply), params)


def test_a_token_has_no_influence_on_those_before_it(causal: Any) -> None:
    text = texts(length=10)["text"]
    other = text.copy()
    other[:, 6] = (text[:, 6] + 1) % 50
    out, changed = np.asarray(causal(text)), np.asarray(causal(other))
    assert out.shape == (2, 10, 16)
    assert np.array_equal(changed[:, :6], out[:, :6])
    assert (np.abs(changed[:, 6:] - out[:, 6:]).max(axis=-1) > 1e-3).all()


def test_a_text_may_be_shorter_and_not_longer_than_the_context(causal: Any) -> None:
    text = texts(length=11)["text"]
    whole = np.asarray(causal(text[:, :10]))
    assert_allclose(np.asarray(causal(text[:, :7])), whole[:, :7], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="context=10: the texts have 11 tokens; cut them, or raise it"):
        causal(text)


def test_the_end_of_text_is_the_first_of_the_greatest_ids() -> None:
    text = jnp.asarray([[1, 9, 3, 9], [9, 0, 0, 0], [1, 2, 3, 4]])
    x = jnp.arange(24, dtype=jnp.float32).reshape(3, 4, 2)
    assert end_of_text(x, text).tolist() == [[2, 3], [8, 9], [22, 23]]
