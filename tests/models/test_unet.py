"""U-Nets: what they cost, how they start, what they accept, and that they train and sample."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from scaling import flops
from scaling.errors import UserError
from scaling.models import unet
from scaling.models.convolutions import average_pool, upsample
from scaling.objectives.base import Extras
from scaling.objectives.diffusion import Diffusion
from scaling.sampling import Sampling, make_sampler
from tests.support import running
from tests.support.running import KEY, jit, largest_error, named, random_params, run
from tests.support.unets import ONE, batch

RNG = np.random.default_rng(0)
KINDS = pytest.mark.parametrize("kind", ["adm", "ldm"])


# Names, and how parameters start


@KINDS
def test_names_and_shapes_of_the_parameters(kind: Any) -> None:
    model = unet.UNet(kind=kind, width=64, multipliers=(1, 2), depth=1, attention=(2,), num_classes=99)
    leaves = named(jax.eval_shape(functools.partial(model.init, KEY), **batch())["params"])
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    blocks = ["down_0_block_0", "down_1_block_0", "middle_block_0", "middle_block_1"]
    blocks += ["up_1_block_0", "up_1_block_1", "up_0_block_0", "up_0_block_1"]
    whole = {"input", "time", "label", *blocks, "down_0_sample", "up_1_sample", "norm", "output"}
    assert {path.split("/")[0] for path in shapes} == whole
    attended = {path.split("/")[0] for path in shapes if "query" in path}
    assert attended == {"down_1_block_0", "middle_block_0", "up_1_block_0", "up_1_block_1"}
    for path, shape in (SHAPES | KIND_SHAPES[kind]).items():
        assert shapes[path] == shape, path
    assert any("query/bias" in path for path in shapes) == (kind == "adm")


SHAPES = {
    "input/kernel": (3, 3, 3, 64), "output/kernel": (3, 3, 64, 6),
    "time/up/kernel": (64, 256), "time/down/kernel": (256, 256),
    "down_1_block_0/residual/conv_in/kernel": (3, 3, 64, 128),
    "down_1_block_0/residual/skip/kernel": (1, 1, 64, 128),
    "up_1_block_1/residual/conv_in/kernel": (3, 3, 128 + 64, 128),
}  # fmt: skip
KIND_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "adm": {
        "label/embedding": (100, 256), "up_1_sample/residual/conv_in/kernel": (3, 3, 128, 128),
        "down_1_block_0/residual/condition/kernel": (256, 256),
        "down_1_block_0/attention/query/kernel": (128, 2, 64),
        "down_1_block_0/attention/query/bias": (2, 64),
    },
    "ldm": {
        "label/embedding": (100, 512), "up_1_sample/kernel": (3, 3, 128, 128),
        "down_1_block_0/residual/condition/kernel": (256, 128),
        "down_1_block_0/transformer/attention/query/kernel": (128, 2, 64),
        "down_1_block_0/transformer/cross_attention/key/kernel": (512, 2, 64),
        "down_1_block_0/transformer/mlp/up/kernel": (128, 512),
        "down_1_block_0/transformer/mlp/gate/kernel": (128, 512),
        "down_1_block_0/transformer/mlp/down/kernel": (512, 128),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["adm", pytest.param("ldm", marks=pytest.mark.slow)])
def test_what_starts_at_0_and_what_as_pytorch_starts_it(kind: str) -> None:
    model = ONE[kind].clone(width=64, groups=32, head_width=32, num_classes=99)
    params = jit(model.init)(KEY, **batch())
    zeros = ("conv_out/kernel", "output/kernel", "proj_out/kernel", "bias")
    for path, leaf in named(params["params"]).items():
        zero = path.endswith(zeros) or (kind == "adm" and path.endswith("attention/out/kernel"))
        assert zero == (not np.any(leaf)), path
        if path.endswith("embedding"):
            assert float(leaf.std()) == pytest.approx(1, rel=0.03)
        elif path.endswith("kernel") and not zero:
            fan_in = math.prod(leaf.shape[:-2] if leaf.shape[-2:] == (2, 32) else leaf.shape[:-1])
            assert float(np.abs(leaf).max()) == pytest.approx(1 / math.sqrt(fan_in), rel=0.02), path
            assert float(leaf.std()) == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.05), path


# Forms


@pytest.fixture(scope="module")
def plain() -> Any:
    inputs = batch()
    params = random_params(ONE["adm"], **inputs)
    return params, inputs, *run(ONE["adm"], params, **inputs)


def test_remat_gives_the_same(plain: Any) -> None:
    params, inputs, expected, expected_grads = plain
    out, grads = run(ONE["adm"].clone(remat="full"), params, **inputs)
    assert largest_error(out, expected) < 1e-5
    assert largest_error(grads, expected_grads) < 1e-5


def test_remat_recomputes_the_blocks_and_dots_keeps_linear_layers(plain: Any) -> None:
    params, inputs, *_ = plain

    def macs(remat: Any) -> int:
        model = ONE["adm"].clone(remat=remat)
        return flops.macs(jax.grad(lambda p: model.apply(p, **inputs).sum()), params)

    none, full, dots = map(macs, ("none", "full", "dots"))
    assert none < dots < full


def test_bfloat16_is_close_and_its_output_float32(plain: Any) -> None:
    params, inputs, expected, _ = plain
    running.check_bfloat16(jit(ONE["adm"].clone(dtype="bfloat16").apply)(params, **inputs), expected)


@KINDS
def test_forward_mode_agrees_with_finite_differences(kind: str) -> None:
    model, inputs = ONE[kind].clone(remat="full"), batch()
    params = random_params(model, **inputs)
    running.check_forward_mode(model, params, step=0.005, within=3e-3, **inputs)


def test_resampling_of_pixels() -> None:
    x = jnp.arange(8, dtype=jnp.float32).reshape(1, 2, 4, 1)
    assert_allclose(average_pool(x, 2)[0, :, :, 0], [[2.5, 4.5]])
    up = np.asarray(upsample(x))[0, :, :, 0]
    assert_allclose(up, np.kron(np.asarray(x)[0, :, :, 0], np.ones((2, 2))))


# Training and sampling


@pytest.mark.slow
def test_it_trains_under_the_diffusion_objective() -> None:
    task = Diffusion(ONE["adm"], condition_dropout=0.5)
    images = jnp.asarray(RNG.integers(0, 256, (4, 4, 4, 1)), jnp.uint8)
    given = {"image": images, "label": jnp.array([0, 1, 2, 0])}
    shapes = jax.eval_shape(task.init, KEY, given)["params"]
    params = jax.tree.map(lambda s: jnp.asarray(0.1 * RNG.standard_normal(s.shape), jnp.float32), shapes)

    @jit
    def step(params: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        value, grads = jax.value_and_grad(lambda p: task.loss(p, Extras(), given, key, True).value)(params)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), value

    losses = []
    for _ in range(16):
        params, value = step(params, KEY)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


@KINDS
def test_its_samples_are_images(kind: str) -> None:
    task = Diffusion(ONE[kind].clone(learn_sigma=kind == "adm"))
    shapes = jax.eval_shape(
        task.init, KEY, {"image": jnp.zeros((1, 4, 4, 1)), "label": jnp.zeros(1, jnp.int32)}
    )
    sample = make_sampler(Sampling(steps=2, guidance_scale=2.0), task, (4, 4, 1))
    labels = jnp.array([0, 1], jnp.int32)
    assert jax.eval_shape(sample, shapes["params"], labels, labels).shape == (2, 4, 4, 1)


@KINDS
def test_the_null_label_is_the_last_row_of_the_table(kind: str) -> None:
    model, inputs = ONE[kind], batch()
    running.check_null_label(model, random_params(model, **inputs), **inputs)


# What it accepts


@pytest.mark.parametrize("variant", unet.SIZES)
def test_a_variants_inputs(variant: str) -> None:
    model, inputs = unet.make(variant), unet.inputs(variant)
    assert next(iter(inputs)) == "x" and ("low" in inputs) == model.upsampler == (variant == "ADM-U-256")
    if model.upsampler:
        assert inputs["low"].shape == (1, 64, 64, 3)
    size = {"ADM-64": 64, "LDM-4": 64, "LDM-8": 32, "small": 28}.get(variant, 256)
    assert inputs["x"].shape == (1, size, size, {"LDM-8": 4, "small": 1}.get(variant, 3))
    resolutions = {size // stride for stride in model.attention}
    assert resolutions == ({14, 7} if variant == "small" else {32, 16, 8})


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("ADM-512", {}, "variant='ADM-512': must be one of ADM-64, ADM-256, ADM-U-256, LDM-4, LDM-8, small"),
        ("LDM-8", {"blok": 1}, r"model\.blok: no such key"),
        ("LDM-8", {"kind": "ddpm"}, r"model\.kind='ddpm': must be one of adm, ldm"),
        ("LDM-8", {"multipliers": 2}, r"model\.multipliers=2: must be a tuple of an integer"),
        ("LDM-8", {"head_width": 0}, r"model\.head_width=0: must be positive"),
        ("LDM-8", {"dtype": "float16"}, "dtype='float16': must be one of float32, bfloat16"),
    ],
)
def test_bad_options_are_named(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        unet.make(variant, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipliers": ()}, r"multipliers=\(\): must be one or more positive integers"),
        ({"multipliers": (1, 0, 1)}, r"multipliers=\(1, 0, 1\): must be one or more positive integers"),
        ({"attention": (3,)}, r"attention=\(3,\): must be of the stages' strides \(1, 2, 4\)"),
        ({"multipliers": (1, 1, 1, 1)}, "4 stages need a height and width that 8 divides, .* are 28x28"),
        ({"groups": 32}, "groups=32: must divide the width, which is 16"),
        ({"heads": 3}, "heads=3: must divide the channels of stage 1, which are 32"),
        ({"head_width": 48}, "head_width=48: must divide the channels of stage 1, which are 32"),
        ({"upsampler": True}, "upsampler=True: this model needs the input low"),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(options: dict[str, Any], message: str) -> None:
    model = unet.make("small", **options)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(functools.partial(model.init, KEY), **unet.inputs("small"))


def test_an_image_at_low_resolution_is_for_upsamplers() -> None:
    with pytest.raises(UserError, match="upsampler=False: this model takes no input low"):
        jax.eval_shape(functools.partial(ONE["adm"].init, KEY), **batch(), low=jnp.zeros((2, 2, 1, 3)))
