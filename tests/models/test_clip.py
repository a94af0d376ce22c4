"""CLIP: parity with transformers, counts, and every way to run it; its ResNet has a test of its own."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import CLIPConfig, CLIPModel

from scaling.convert.huggingface import clip as huggingface_clip
from scaling.errors import UserError
from scaling.models import clip, layers, table, vit
from tests.support import parity, running
from tests.support.running import KEY, jit, largest_error, named, random_params, run

Tree = dict[str, Any]
TEXT: Tree = {
    "embed_dim": 10,
    "text_width": 16,
    "text_depth": 2,
    "text_heads": 2,
    "vocabulary": 30,
    "context": 9,
}
VIT: Tree = {"patch": 4, "width": 24, "depth": 2, "heads": 3, "resolution": 12, **TEXT}


def images(height: int, width: int | None = None, batch: int = 3) -> np.ndarray:
    shape = (batch, height, width or height, 3)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def texts(vocabulary: int = 30, length: int = 9) -> np.ndarray:
    """Three texts whose greatest ids are at the end, amid others, and twice."""
    text = np.random.default_rng(1).integers(0, vocabulary - 1, (3, length)).astype(np.int32)
    text[0, -1] = text[1, 2] = text[2, 4] = text[2, 6] = vocabulary - 1
    return text


# Parity of the transformers


def reference_of(model: clip.CLIP) -> CLIPModel:
    x = jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.float32)
    made = CLIPConfig(**huggingface_clip.config(model, {"x": x}))
    return CLIPModel._from_config(made, attn_implementation="eager").eval()


def compare(model: clip.CLIP, reference: CLIPModel, x: np.ndarray, text: np.ndarray) -> None:
    """Embeddings and scale. Their gradients depend on how long the features were, so that is compared too."""
    pixels = torch.from_numpy(x).to(reference.dtype).permute(0, 3, 1, 2)
    out = reference(torch.from_numpy(text).long(), pixels)
    outputs = clip.Embeddings(out.image_embeds, out.text_embeds, reference.logit_scale.exp())
    parity.compare(model, huggingface_clip.table(model), {"x": x, "text": text}, reference, outputs)


def test_vit_against_transformers() -> None:
    model = clip.CLIP(**VIT, epsilon=1e-3)
    reference = reference_of(model).double()
    parity.randomise(reference, 0.5)  # enough for the forms of GELU to differ
    compare(model, reference, images(12), texts())


@pytest.mark.slow
def test_vit_b_32_against_transformers() -> None:
    model = clip.make("ViT-B/32")
    torch.manual_seed(0)
    reference = reference_of(model)
    parity.randomise(reference, 0.03, kept=1)  # as it starts, but with biases and norms of some effect
    compare(model, reference, images(224, batch=2), texts(49408, 77)[1:])


# Counts. open_clip's model_profile.csv: millions of parameters, and Gflops of two for a multiply-add.

PROFILE = [
    ("RN50", {}, "102.01", "18.18"),
    ("RN101", {}, "119.69", "25.50"),
    ("RN50x4", {}, "178.30", "51.82"),
    ("RN50x16", {}, "290.98", "162.69"),
    ("RN50x64", {}, "623.26", "552.65"),
    ("ViT-B/32", {}, "151.28", "14.78"),
    ("ViT-B/16", {}, "149.62", "41.09"),
    ("ViT-L/14", {}, "427.62", "175.33"),
    ("ViT-L/14", {"resolution": 336}, "427.94", "395.22"),
]


def of_all_queries(variant: str, options: Tree) -> int:
    """Multiply-adds of attention pooling for pixels' queries: open_clip computes and drops them."""
    model = clip.make(variant, **options)
    if model.patch is not None:
        return 0
    n, d = (model.resolution // 32) ** 2, model.width
    return n * (d * d + d * model.embed_dim) + 2 * n * (n + 1) * d


@pytest.mark.parametrize(("variant", "options", "params_m", "gflops"), PROFILE)
def test_counts_agree_with_open_clip(variant: str, options: Tree, params_m: str, gflops: str) -> None:
    cost = table.cost(clip.make(variant, **options), clip.inputs(variant, **options))
    assert f"{cost['params'] / 1e6:.2f}" == params_m
    # To the digits printed: of a transformer all products count, here and there, masked logits included.
    assert f"{cost['gflops'] + 2e-9 * of_all_queries(variant, options):.2f}" == gflops
    patches = {"ViT-B/32": 49, "ViT-B/16": 196, "ViT-L/14": 576 if options else 256}
    assert cost["tokens"] == patches.get(variant)


def test_every_variant_is_counted() -> None:
    published = [row for row in clip.VARIANTS if clip.inputs(row[0])["text"].shape == (1, 77)]
    assert [(variant, options) for variant, options, _, _ in PROFILE] == published


# Every way to run it


INPUTS = {"x": images(12), "text": texts()}


@pytest.fixture(scope="module")
def scanned() -> Any:
    variables = random_params(clip.CLIP(**VIT), **INPUTS, scale=0.3)
    return variables, *run(clip.CLIP(**VIT), variables, **INPUTS)


def test_every_form_of_the_depth_gives_the_same(scanned: Any) -> None:
    variables, expected, expected_grads = scanned
    out, grads = run(clip.CLIP(**VIT, unroll=True, remat="full"), variables, **INPUTS)
    assert largest_error(out, expected) < 1e-5
    assert largest_error(grads, expected_grads) < 1e-5


def test_bfloat16_is_close_and_its_embeddings_float32(scanned: Any) -> None:
    variables, expected, _ = scanned
    out = jax.device_get(jit(clip.CLIP(**VIT, dtype="bfloat16").apply)(variables, **INPUTS))
    assert out.scale.dtype == np.float32
    running.check_bfloat16(out.image, expected.image)
    running.check_bfloat16(out.text, expected.text)


def test_forward_mode_agrees_with_finite_differences(scanned: Any) -> None:
    running.check_forward_mode(clip.CLIP(**VIT), scanned[0], step=0.005, **INPUTS)


def test_embeddings_are_the_features_at_length_1(scanned: Any) -> None:
    variables, out, _ = scanned
    for which, x in (("image", INPUTS["x"]), ("text", INPUTS["text"])):
        apply = functools.partial(clip.CLIP(**VIT).apply, method=f"{which}_features")
        features = np.asarray(jit(apply)(variables, x))
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        assert np.abs(lengths - 1).min() > 0.01
        assert_allclose(getattr(out, which), features / lengths, rtol=1e-4, atol=1e-5)


def test_the_modified_resnet_is_a_tower_of_the_same_model() -> None:
    options = TEXT | {"patch": None, "width": 64, "depth": (1, 1, 1, 1), "heads": 2, "resolution": 32}
    model, inputs = clip.CLIP(**options), {"x": images(32), "text": texts()}
    variables = random_params(model, **inputs, scale=0.3)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    apply = jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    out, new = apply(variables, **inputs)
    assert [e.shape for e in out[:3]] == [(3, 10), (3, 10), ()]
    assert_allclose(np.linalg.norm(out.image, axis=1), 1, rtol=1e-5)
    assert largest_error(new["batch_stats"], variables["batch_stats"]) > 0.01
    jax.eval_shape(model.apply, variables, **inputs)  # in evaluation nothing needs to be mutable


@pytest.mark.parametrize(("logit", "scale"), [(4.0, math.exp(4)), (4.7, 100.0), (9.0, 100.0), (-1.0, 1.0)])
def test_the_scale_is_held_between_1_and_100_by_its_parameter(logit: float, scale: float) -> None:
    """And its gradient is not: a scale that is held can come down."""

    def of(logit: jax.Array) -> jax.Array:
        params = {"logit_scale": logit}
        return jnp.asarray(clip.CLIP(**VIT).apply({"params": params}, method="scale"))

    held = clip.bounded({"logit_scale": jnp.float32(logit), "other": 1})
    assert held["other"] == 1 and float(of(held["logit_scale"])) == pytest.approx(scale, rel=1e-5)
    assert jax.grad(of)(held["logit_scale"]) == pytest.approx(scale, rel=1e-5)


def test_another_resolution_resizes_the_table_and_nothing_else(scanned: Any) -> None:
    variables, _, _ = scanned
    made_for_it, x = clip.CLIP(**{**VIT, "resolution": 20}), images(20)
    image = variables["params"]["image"]
    patches = layers.resize_positions(image["positions"][1:], (3, 3), (5, 5))
    image = image | {"positions": jnp.concatenate([image["positions"][:1], patches])}
    resized = {"params": variables["params"] | {"image": image}}
    shapes = jax.eval_shape(made_for_it.init, KEY, x, texts())
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, resized)
    features = functools.partial(clip.CLIP.apply, method="image_features")
    expected = jit(functools.partial(features, made_for_it))(resized, x)
    out = jit(functools.partial(features, clip.CLIP(**VIT)))(variables, x)
    assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


# How it starts, and what it is told


def start(options: Tree) -> dict[str, np.ndarray]:
    x = jnp.zeros((1, options["resolution"], options["resolution"], 3))
    return named(jax.device_get(jit(clip.CLIP(**options).init)(KEY, x, jnp.asarray(texts())))["params"])


def check_start(flat: dict[str, np.ndarray], std: dict[str, float], prefix: str) -> None:
    """The deviations under the prefix; what is not named is a bias at 0 or a norm's scale at 1."""
    for name in [n for n in flat if n.startswith(prefix) and n not in std]:
        assert name.endswith(("bias", "scale")), name
        assert np.all(flat[name] == (1 if name.endswith("scale") else 0)), name
    for name, value in std.items():
        assert flat[name].mean() == pytest.approx(0, abs=6 * value / math.sqrt(flat[name].size)), name
        assert flat[name].std() == pytest.approx(value, rel=5 / math.sqrt(flat[name].size)), name


def blocks(prefix: str, width: int, depth: int) -> dict[str, float]:
    at, residual = width**-0.5, (2 * width * depth) ** -0.5
    kernels = {"attention/query": at, "attention/key": at, "attention/value": at, "attention/out": residual}
    kernels |= {"mlp/up": (2 * width) ** -0.5, "mlp/down": residual}
    return {f"{prefix}/blocks/{name}/kernel": std for name, std in kernels.items()}


def test_start_of_the_transformers() -> None:
    flat = start(VIT | {"width": 96, "text_width": 64, "vocabulary": 300, "context": 40})
    std = blocks("image", 96, 2) | {f"image/{n}": 96**-0.5 for n in ("token", "positions")}
    std |= {"image/projection/kernel": 96**-0.5, "image/patch/kernel": (3 * 48) ** -0.5}
    check_start(flat, std, "image/")
    assert np.abs(flat["image/patch/kernel"]).max() <= 48**-0.5
    std = blocks("text", 64, 2) | {"text/tokens/embedding": 0.02, "text/positions": 0.01}
    check_start(flat, std, "text/")
    check_start(flat, {"text_projection/kernel": 64**-0.5}, "text_projection")
    assert np.exp(flat["logit_scale"]) == pytest.approx(1 / 0.07)
    assert flat["logit_scale"].shape == ()
    assert flat["image/token"].shape == (1, 96)
    assert flat["image/positions"].shape == (10, 96)
    assert flat["image/blocks/attention/query/kernel"].shape == (2, 96, 3, 32)
    assert flat["text/blocks/mlp/up/kernel"].shape == (2, 64, 256)


def test_inputs_follow_their_options() -> None:
    shapes = {name: x.shape for name, x in clip.inputs("ViT-L/14", resolution=336, context=20).items()}
    assert shapes == {"x": (1, 336, 336, 3), "text": (1, 20)}
    sides = [clip.inputs(name)["x"].shape[1] for name in ("RN50x4", "RN50x16", "RN50x64")]
    assert sides == [288, 384, 448]
    assert clip.inputs("RN50x4")["text"].shape == (1, 77)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (
            "ViT-B",
            {},
            "variant='ViT-B': must be RN50, RN101, RN50x4, RN50x16, RN50x64, or one of ViT-B, ViT-L, ViT-F, ",
        ),
        ("RN50/32", {}, "variant='RN50/32': must be RN50"),
        ("ViT-H/14", {}, "variant='ViT-H/14': must be RN50"),
        ("ViT-B/32", {"text_dept": 3}, r"model\.text_dept: no such key; did you mean model\.text_depth\?"),
        ("ViT-B/32", {"activation": "relu"}, r"model\.activation='relu': must be one of quick_gelu, gelu"),
        ("ViT-B/32", {"context": 0}, r"model\.context=0: must be positive"),
    ],
)
def test_bad_options_are_named(variant: str, options: Tree, message: str) -> None:
    with pytest.raises(UserError, match=message):
        clip.make(variant, **options)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("ViT-B/32", {"patch": 30}, "patch=30: must divide the input's height and width, which are 224x224"),
        ("ViT-B/32", {"heads": 7}, "heads=7: must divide the width, which is 768"),
        ("ViT-B/32", {"text_heads": 7}, "heads=7: must divide the width, which is 512"),
        ("ViT-B/32", {"patch": None}, "patch=None, depth=12: must be two integers for a ViT, or None and"),
        ("RN50", {"depth": 50}, "patch=None, depth=50: must be two integers for a ViT, or None and"),
        ("ViT-B/32", {"context": 70}, "context=70: the texts have 77 tokens; cut them, or raise it"),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(variant: str, options: Tree, message: str) -> None:
    model = clip.make(variant, **options)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, KEY, **clip.inputs(variant))


# A trained ViT as the image tower

IMAGES: Tree = {"patch": 4, "width": 24, "depth": 2, "heads": 3}
PLAIN = clip.CLIP(**{**VIT, "embed_dim": 24}, pre_norm=False, activation="gelu", epsilon=1e-6)


@pytest.mark.parametrize("resolution", [12, 20])
def test_a_vit_as_the_image_tower_gives_its_features(resolution: int) -> None:
    """At its own resolution, and at another as the ViT itself at that size."""
    source, model = vit.ViT(**IMAGES, resolution=12), PLAIN.clone(resolution=resolution)
    x = images(resolution)
    theirs = random_params(source, images(12))["params"]
    fresh = random_params(model, x, texts())["params"]
    begun = clip.from_vit(model, fresh, source, theirs)
    begun["image"]["projection"] = {"kernel": np.eye(24, dtype=np.float32)}
    ours = jit(model.apply)({"params": begun}, x, texts())
    expected = jit(functools.partial(source.apply, head=False))({"params": theirs}, x)
    assert_allclose(ours.image, clip.unit(expected), atol=1e-5)
    for name in ("text", "text_projection", "logit_scale"):
        assert begun[name] is fresh[name]


def test_a_vit_that_the_tower_cannot_be_is_refused() -> None:
    source, params = vit.ViT(**IMAGES, resolution=12), {"positions": np.zeros((10, 24))}
    with pytest.raises(UserError, match=r"vit\.width=24: must be that of CLIP, which is 48"):
        clip.from_vit(PLAIN.clone(width=48), params, source, params)
    with pytest.raises(UserError, match=r"vit\.pool='mean': must be 'token'; train it with --config"):
        clip.from_vit(PLAIN, params, source.clone(pool="mean"), params)
    with pytest.raises(UserError, match=r"model\.activation=quick_gelu: must be gelu"):
        clip.from_vit(PLAIN.clone(activation="quick_gelu"), params, source, params)
    with pytest.raises(UserError, match=r"pre_norm=False: must be True, the only one in this format"):
        huggingface_clip.table(PLAIN)
