"""The KL autoencoder: against diffusers, how it starts, its posterior, and decoding by tiles."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.testing import assert_allclose
from torch.utils.flop_counter import FlopCounterMode

from scaling.convert.diffusers import vae as diffusers_vae
from scaling.errors import UserError
from scaling.models import table, vae
from tests.support import parity, running
from tests.support.running import KEY, jit, largest_error, named, random_params, scalar

TINY: dict[str, Any] = {"widths": (4, 8), "blocks": 1, "groups": 2, "latent_channels": 2}


def reference_of(model: vae.VAE) -> AutoencoderKL:
    config = diffusers_vae.config(model, vae.inputs("SD"))
    del config["_class_name"]
    return AutoencoderKL(**config).eval()


def compare(model: vae.VAE, scale: float, small: float, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Moments of x, the decoded latent z, and the gradients of all; what the reference gave."""
    reference = reference_of(model).double()
    parity.randomise(reference, scale)
    for side in (reference.encoder, reference.decoder):  # the first norms then see little but epsilon
        side.conv_in.weight.data *= small
        side.conv_in.bias.data *= small
    variances = slice(model.latent_channels, None)  # so that some pass either bound
    reference.quant_conv.weight.data[variances] *= 5 / scale
    reference.quant_conv.bias.data[variances] = torch.linspace(-30, 27, model.latent_channels)
    height, width = (side // model.factor for side in x.shape[1:3])
    z = np.random.default_rng(1).standard_normal((len(x), height, width, model.latent_channels))
    z = z.astype(np.float32)

    images, latents = (torch.from_numpy(a).double().permute(0, 3, 1, 2) for a in (x, z))
    posterior = reference.encode(images).latent_dist
    out = (posterior.mean, posterior.logvar, reference.decode(latents).sample)
    out = tuple(o.permute(0, 2, 3, 1) for o in out)

    def call(variables: Any, x: jax.Array) -> Any:
        moments = model.apply(variables, x, method="moments")
        return *moments, model.apply(variables, z, method="decode")

    parity.compare(model, diffusers_vae.table(model), {"x": x}, reference, out, call)
    return tuple(o.detach().numpy() for o in out)


def test_vae_against_diffusers() -> None:
    model = vae.VAE(widths=(4, 8, 8), blocks=1, groups=2, latent_channels=3, channels=2)
    x = np.random.default_rng(0).standard_normal((2, 12, 20, 2)).astype(np.float32)
    mean, logvar, image = compare(model, 0.3, 3e-3, x)
    assert mean.shape == logvar.shape == (2, 3, 5, 3)
    assert image.shape == x.shape
    assert logvar.min() == -30 and logvar.max() == 20
    assert 0.1 < np.mean((logvar > -30) & (logvar < 20)) < 0.9


@pytest.mark.slow
def test_full_size_sd_against_diffusers() -> None:
    x = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    mean, _, image = compare(vae.make("SD"), 0.05, 3e-2, x)
    assert mean.shape == (1, 8, 8, 4)
    assert image.shape == x.shape


def test_sd_costs_what_diffusers_has() -> None:
    """Parameters, and the multiply-adds that PyTorch counts."""
    model = vae.make("SD")
    with torch.device("meta"):
        reference, x = reference_of(model), torch.zeros(1, 3, 256, 256)
    with FlopCounterMode(display=False) as counter:
        reference(x)
    cost = table.cost(model, vae.inputs("SD"))
    assert cost["params"] == sum(p.numel() for p in reference.parameters()) == 83_653_863
    assert round(cost["gmacs"] * 1e9) == counter.get_total_flops() // 2
    assert cost["tokens"] is None


def image(height: int = 4, width: int = 6) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, height, width, 3)), jnp.float32)


@pytest.fixture(scope="module")
def tiny() -> Any:
    model, x = vae.VAE(**TINY), image()
    variables = random_params(model, x)
    return model, variables, x, np.asarray(jit(model.apply)(variables, x))


def test_remat_gives_the_same() -> None:
    """Of the decoder; the encoder is made of the same parts."""
    options, z = TINY | {"widths": (4,)}, image()[..., :2]
    variables = random_params(vae.VAE(**options), image())

    def run(model: vae.VAE) -> tuple[Any, Any]:
        def loss(variables: Any) -> tuple[jax.Array, jax.Array]:
            out = model.apply(variables, z, method="decode")
            return scalar(out), out

        assert ("remat" in str(jax.make_jaxpr(loss)(variables))) == (model.remat == "full")
        return jax.device_get(jit(jax.grad(loss, has_aux=True))(variables))

    (expected_grads, expected), (grads, out) = (run(vae.VAE(**options, remat=r)) for r in ("none", "full"))
    assert largest_error(out, expected) < 1e-5
    assert largest_error(grads, expected_grads) < 1e-5


def test_bfloat16_is_close_and_what_comes_out_float32(tiny: Any) -> None:
    _, variables, x, expected = tiny
    model = vae.VAE(**TINY, dtype="bfloat16")
    running.check_bfloat16(jit(model.apply)(variables, x), expected)
    moments = jax.eval_shape(functools.partial(model.apply, method="moments"), variables, x)
    assert {leaf.dtype for leaf in moments} == {np.dtype("float32")}


def test_forward_mode_agrees_with_finite_differences(tiny: Any) -> None:
    model, variables, x, _ = tiny
    running.check_forward_mode(model, variables, x)


def test_names_shapes_and_start_of_the_parameters() -> None:
    model = vae.VAE(widths=(8, 16), blocks=1, groups=4)
    found = named(jax.device_get(jit(model.init)(KEY, image()))["params"])
    for name, shape in {
        "encoder/conv_in/kernel": (3, 3, 3, 8),
        "encoder/down_0/kernel": (3, 3, 8, 8),
        "encoder/level_1/block_0/shortcut/kernel": (1, 1, 8, 16),
        "encoder/middle/attend/attention/query/kernel": (16, 1, 16),
        "encoder/conv_out/kernel": (3, 3, 16, 8),
        "quant/kernel": (1, 1, 8, 8),
        "post_quant/kernel": (1, 1, 4, 4),
        "decoder/conv_in/kernel": (3, 3, 4, 16),
        "decoder/up_1/kernel": (3, 3, 16, 16),
        "decoder/level_0/block_0/shortcut/kernel": (1, 1, 16, 8),
        "decoder/level_0/block_1/conv_2/kernel": (3, 3, 8, 8),
        "decoder/conv_out/kernel": (3, 3, 8, 3),
    }.items():
        assert found[name].shape == shape, name
    for name, leaf in found.items():
        kind = name.rpartition("/")[2]
        if kind in ("bias", "scale"):
            assert np.all(leaf == (kind == "scale")), name
        elif "attention" not in name and leaf.size > 200:
            bound = 1 / math.sqrt(leaf[..., 0].size)
            assert 0.97 * bound < np.abs(leaf).max() <= bound, name


def test_encode_draws_from_the_posterior_by_key(tiny: Any) -> None:
    model, variables, x, reconstruction = tiny

    @jit
    def everything(key: jax.Array) -> Any:
        moments = model.apply(variables, x, method="moments")
        encoded = [model.apply(variables, x, *args, method="encode") for args in ((), (key,))]
        return moments, *encoded, model.apply(variables, x, key)

    (mean, logvar), mode, z, drawn = everything(KEY)
    assert z.shape == mean.shape == (2, 2, 3, 2)
    assert_allclose(mode, mean, rtol=1e-5)
    assert_allclose(z, vae.sample(mean, logvar, KEY), rtol=1e-4, atol=1e-5)
    assert np.abs(everything(jax.random.key(1))[2] - z).min() > 0
    decode = jit(functools.partial(model.apply, method="decode"))
    assert_allclose(decode(variables, mean), reconstruction, rtol=1e-3, atol=1e-4)
    assert_allclose(decode(variables, z), drawn, rtol=1e-3, atol=1e-4)


def test_a_draw_has_the_posteriors_moments() -> None:
    mean, logvar = jnp.full((200, 10, 10, 2), 1.5), jnp.full((200, 10, 10, 2), 2 * math.log(0.3))
    mean = mean.at[:100].set(-0.5)
    z = np.asarray(vae.sample(mean, logvar, KEY), np.float64)
    assert z[100:].mean() == pytest.approx(1.5, abs=0.01)
    assert z[100:].std() == pytest.approx(0.3, rel=0.02)


def test_inputs_follow_the_channels() -> None:
    assert vae.inputs("SD")["x"].shape == (1, 256, 256, 3)
    assert vae.inputs("small")["x"].shape == (1, 28, 28, 1)
    assert vae.inputs("small", channels=3)["x"].shape == (1, 28, 28, 3)
    assert (vae.make("SD").factor, vae.make("small").factor) == (8, 4)
    assert vae.make("SD").latent_scale == 0.18215


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("XL", {}, "variant='XL': must be one of SD, small"),
        ("SD", {"width": 3}, r"model\.width: no such key; did you mean model\.widths\?"),
        ("SD", {"blocks": 0}, r"model\.blocks=0: must be positive"),
        ("SD", {"remat": "dots"}, r"model\.remat='dots': must be one of none, full"),
    ],
)
def test_bad_options_are_named(variant: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vae.make(variant, **options)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"groups": 3}, (8, 8, 3), r"widths=\(4, 8\): must be one or more multiples of groups=3"),
        ({"widths": ()}, (8, 8, 3), r"widths=\(\): must be one or more multiples of groups=2"),
        ({}, (8, 8, 1), "channels=3: the input has 1"),
        ({}, (8, 7, 3), r"height and width must be multiples of 2, and are 8x7"),
    ],
)
def test_what_does_not_fit_is_found_without_compiling(
    options: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    model = vae.VAE(**{**TINY, **options})
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, *shape), jnp.float32))


# Tiles


def pixelwise(z: jax.Array) -> jax.Array:
    """A decoder in which every latent makes its own 2x2 pixels."""
    kernel = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2, 2, 1)), jnp.float32)
    return jax.lax.conv_transpose(jnp.tanh(z), kernel.transpose(1, 2, 0, 3), (2, 2), "VALID")


def spread(z: jax.Array) -> jax.Array:
    """A decoder whose pixels see the latents two steps around them."""
    return jax.lax.conv_general_dilated(
        z, jnp.ones((5, 5, 3, 1)) / 75, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(("tile", "overlap"), [(4, 2), (5, 0), (5, 4), (6, 1), (16, 4), (3, 1)])
def test_tiles_cover_every_pixel_once(tile: int, overlap: int) -> None:
    """Weights of a pixel sum to 1, so that a decoder without a neighbourhood gives the whole's image."""
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 14, 3)), jnp.float32)
    tiled = jax.jit(lambda z: vae.tiled_decode(pixelwise, z, tile, overlap))(z)
    assert tiled.shape == (2, 18, 28, 1)
    assert_allclose(tiled, pixelwise(z), rtol=1e-5, atol=1e-6)


def test_tiles_are_the_whole_where_they_see_what_it_sees() -> None:
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, 40, 3)), jnp.float32)
    tiles = np.asarray(vae.tiled_decode(spread, z, tile=16, overlap=4))  # they start at 0, 12, 24
    wrong = np.abs(tiles - np.asarray(spread(z))).max(axis=(0, 1, 3)) > 1e-5
    seams = np.zeros(40, bool)
    for edge in (12, 16, 24, 28):
        seams[edge - 2 : edge + 2] = True  # a tile's first two and last two columns miss neighbours
    seams[[10, 11, 16, 17, 22, 23, 28, 29]] = False  # there only the other tile is seen
    assert wrong.any()
    assert not (wrong & ~seams).any()


def test_tiles_of_smooth_latents_differ_little_from_the_whole() -> None:
    """Norms and attention see a tile where everything is as everywhere else: within 5 % of the range.

    Without an overlap, the tiles' edges show.
    """
    model = vae.VAE(**{**TINY, "channels": 1, "widths": (8, 8)})
    variables = random_params(model, jnp.zeros((1, 8, 8, 1)), scale=0.1)
    wave = np.cos(2 * np.pi * np.arange(32) / 8)
    z = np.stack([np.add.outer(wave, wave), np.subtract.outer(wave, wave)], -1).astype(np.float32)[None]
    decode = jax.jit(functools.partial(model.apply, variables, method="decode"))
    whole = np.asarray(decode(z))
    assert whole.shape == (1, 64, 64, 1)

    def error(overlap: int) -> float:
        tiled = np.asarray(vae.tiled_decode(decode, jnp.asarray(z), tile=16, overlap=overlap))
        return float(np.abs(tiled - whole).max() / np.ptp(whole))

    assert error(overlap=8) < 0.05
    assert error(overlap=0) > 0.5


def test_memory_of_tiles_is_that_of_one_tile_and_the_image() -> None:
    def decode(z: jax.Array) -> jax.Array:
        return jnp.tanh(z @ jnp.ones((3, 512))) @ jnp.ones((512, 1))

    def temporary(side: int, **tiles: int) -> int:
        fn = functools.partial(vae.tiled_decode, decode, **tiles) if tiles else decode
        z = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        return int(jax.jit(fn).lower(z).compile().memory_analysis().temp_size_in_bytes)

    pixels = 4 * 512 * 8**2  # bytes of a tile's activations
    for side in (16, 64):
        image = 4 * side**2
        assert temporary(side, tile=8, overlap=2) < 2.5 * pixels + 3 * image
        assert temporary(side) >= 512 * image


def test_overlap_must_be_less_than_the_tile() -> None:
    with pytest.raises(UserError, match="overlap=8: must be at least 0 and less than tile=8"):
        vae.tiled_decode(pixelwise, jnp.zeros((1, 16, 16, 3)), tile=8, overlap=8)
