"""Samplers as a run uses them: fixed images, guidance, and what they refuse."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling.errors import UserError
from scaling.objectives.diffusion import Diffusion
from scaling.sampling import Sampling, make_sampler, to_uint8
from tests.support.checks import Denoiser

SHAPE = (4, 4, 2)
BATCH = {"image": jnp.zeros((1, *SHAPE)), "label": jnp.zeros(1, jnp.int32)}
PATH_OF = {"ddpm": "ddpm-linear", "ddim": "ddpm-linear", "euler": "straight", "heun": "straight"}


def _objective(integrator: str, **fields: Any) -> tuple[Diffusion, Any]:
    objective = Diffusion(Denoiser(**fields), path=PATH_OF[integrator], prediction="v")  # type: ignore[arg-type]
    return objective, objective.init(jax.random.key(0), BATCH)["params"]


def _draw(options: Sampling, indices: Any, labels: Any, **fields: Any) -> np.ndarray:
    objective, params = _objective(options.integrator, **fields)
    sampler = make_sampler(options, objective, SHAPE)
    return np.asarray(sampler(params, jnp.asarray(indices, jnp.int32), jnp.asarray(labels, jnp.int32)))


@pytest.mark.parametrize(("integrator", "guidance"), [("ddpm", 2.5), ("heun", 1.0)])
def test_images_do_not_depend_on_the_batch_or_the_devices(integrator: str, guidance: float) -> None:
    options = Sampling(integrator, steps=4, guidance_scale=guidance)  # type: ignore[arg-type]
    objective, params = _objective(integrator)
    sampler = jax.jit(make_sampler(options, objective, SHAPE))
    indices, labels = jnp.arange(8, dtype=jnp.int32), jnp.arange(8, dtype=jnp.int32) % 3
    whole = sampler(params, indices, labels)
    assert whole.shape == (8, *SHAPE) and whole.dtype == jnp.float32
    assert len({image.tobytes() for image in np.asarray(whole)}) == 8
    for size in (1, 4):
        parts = [sampler(params, indices[i : i + size], labels[i : i + size]) for i in range(0, 8, size)]
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
    np.testing.assert_allclose(sampler(params, indices[::-1], labels[::-1])[::-1], whole, atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    sharded = sampler(jax.device_put(params, everywhere), *jax.device_put((indices, labels), rows))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, whole, atol=1e-5)


def test_the_seed_and_the_label_change_images() -> None:
    options = Sampling("heun", steps=3)
    first = _draw(options, [5], [0])
    assert np.abs(first - _draw(options, [5], [1])).max() > 0.05
    assert np.abs(first - _draw(Sampling("heun", steps=3, seed=1), [5], [0])).max() > 0.05
    np.testing.assert_array_equal(first, _draw(options, [5], [0]))


class Optimal(nn.Module):
    """The velocity that is best for data N(0.3, 0.5^2), from the time that a model is given."""

    kind: str
    num_classes: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        t = t[:, None, None, None]
        if self.kind == "straight":
            alpha, sigma, dalpha, dsigma = t, 1.0 - t, jnp.ones_like(t), -jnp.ones_like(t)
        else:  # the time is an original index, 0 to 999, in a respaced chain too
            alpha_bar = jnp.asarray(np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000)), jnp.float32)
            alpha = jnp.sqrt(alpha_bar)[t.astype(jnp.int32)]
            sigma = jnp.sqrt(1.0 - alpha_bar)[t.astype(jnp.int32)]
            dalpha, dsigma = -sigma, alpha
        rest = (x - alpha * 0.3) / (alpha**2 * 0.25 + sigma**2)
        return dalpha * (0.3 + alpha * 0.25 * rest) + dsigma * sigma * rest


@pytest.mark.parametrize(
    ("integrator", "path"), [("ddim", "ddpm-linear"), ("euler", "straight"), ("heun", "straight")]
)
def test_more_steps_refine_the_same_sample(integrator: str, path: str) -> None:
    """A seed has one first noise, whatever the steps, the integrator or the guidance."""
    objective = Diffusion(Optimal(path), path=path, prediction="v")  # type: ignore[arg-type]

    def drawn(steps: int, **options: Any) -> np.ndarray:
        chosen = Sampling(**{"integrator": integrator, "steps": steps, **options})
        sampler = make_sampler(chosen, objective, (4, 4, 1))
        return np.asarray(sampler({}, jnp.arange(50, dtype=jnp.int32), jnp.zeros(50, jnp.int32))).ravel()

    few, more, many = drawn(8), drawn(9), drawn(50)
    assert np.corrcoef(few, more)[0, 1] > 0.999
    assert np.corrcoef(few, many)[0, 1] > 0.99
    assert abs(np.corrcoef(few, drawn(8, seed=1))[0, 1]) < 0.2
    other = {"euler": "heun", "heun": "euler"}.get(integrator, integrator)
    assert np.corrcoef(few, drawn(8, integrator=other))[0, 1] > 0.98


@pytest.mark.parametrize(
    ("integrator", "steps"), [("ddpm", 400), ("ddim", 200), ("euler", 200), ("heun", 20)]
)
def test_gaussian_data_are_recovered(integrator: str, steps: int) -> None:
    objective = Diffusion(Optimal(PATH_OF[integrator]), path=PATH_OF[integrator], prediction="v")  # type: ignore[arg-type]
    sampler = jax.jit(make_sampler(Sampling(integrator, steps=steps), objective, (8, 8, 1)))  # type: ignore[arg-type]
    found = np.asarray(sampler({}, jnp.arange(200, dtype=jnp.int32), jnp.zeros((200,), jnp.int32)))
    # One standard error is 0.0045 of the mean and 0.0031 of the deviation.
    assert found.mean() == pytest.approx(0.3, abs=0.015)
    assert found.std() == pytest.approx(0.5, abs=0.012)
    # Neither pixels nor images share noise: means of 64 values and of 200 scatter as independent ones do.
    assert found.mean(axis=(1, 2, 3)).std() == pytest.approx(0.5 / 8.0, rel=0.2)
    assert found.mean(axis=0).std() == pytest.approx(0.5 / np.sqrt(200.0), rel=0.3)


class Ruled(nn.Module):
    """eps = 0.1 (y + 1) in channel c times (c + 1), null row -1; the raw variance is far from the label's."""

    num_classes: int = 3
    learn_sigma: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        level = jnp.where(y == self.num_classes, -1.0, 0.1 * (y + 1).astype(jnp.float32))[:, None, None, None]
        eps = level * (1.0 + jax.lax.broadcasted_iota(jnp.float32, x.shape, 3))
        return jnp.concatenate([eps, jnp.broadcast_to(level, x.shape)], axis=-1)


class Fixed(nn.Module):
    """A rule without labels: eps [C] and raw variance, constants."""

    eps: tuple[float, ...]
    raw: float
    num_classes: int = 3
    learn_sigma: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        eps = jnp.broadcast_to(jnp.asarray(self.eps), x.shape)
        return jnp.concatenate([eps, jnp.full_like(x, self.raw)], axis=-1)


@pytest.mark.parametrize("channels", [None, 2])
def test_guidance_is_its_formula(channels: int | None) -> None:
    """Guiding labels is what a model does that returns null + s (label - null), and the label's variance."""
    options = Sampling("ddpm", steps=5, guidance_scale=4.0, guidance_channels=channels)
    guide = make_sampler(options, Diffusion(Ruled()), (4, 4, 3))
    label, null = np.array([0.2, 0.4, 0.6]), np.array([-1.0, -2.0, -3.0])
    expected = null + 4.0 * (label - null)
    if channels is not None:
        expected[channels:] = label[channels:]
    plain = make_sampler(
        Sampling("ddpm", steps=5), Diffusion(Fixed(tuple(expected.tolist()), 0.2)), (4, 4, 3)
    )
    indices, labels = jnp.arange(3, dtype=jnp.int32), jnp.ones((3,), jnp.int32)
    np.testing.assert_allclose(guide({}, indices, labels), plain({}, indices, labels), rtol=1e-4, atol=1e-4)


def test_guidance_of_one_is_none_and_runs_no_second_half() -> None:
    objective, params = _objective("euler")
    args = params, jnp.arange(2, dtype=jnp.int32), jnp.array([0, 2], jnp.int32)
    plain = make_sampler(Sampling("euler", steps=3), objective, SHAPE)
    nearly = make_sampler(Sampling("euler", steps=3, guidance_scale=1.0 + 1e-6), objective, SHAPE)
    np.testing.assert_allclose(plain(*args), nearly(*args), atol=1e-4)
    assert "f32[4,4,4,2]" in str(jax.make_jaxpr(nearly)(*args))
    assert "f32[4,4,4,2]" not in str(jax.make_jaxpr(plain)(*args))


def test_clip_holds_the_data_and_the_default_does_not() -> None:
    wild = Diffusion(Fixed((5.0, -5.0), 0.0))
    args = {}, jnp.arange(2, dtype=jnp.int32), jnp.zeros((2,), jnp.int32)
    clipped = make_sampler(Sampling("ddim", steps=5, clip_denoised=True), wild, SHAPE)(*args)
    assert jnp.abs(clipped).max() <= 1.0 + 1e-5
    assert jnp.abs(make_sampler(Sampling("ddim", steps=5), wild, SHAPE)(*args)).max() > 2.0


@pytest.mark.parametrize("prediction", ["eps", "x", "v"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("integrator", ["euler", "heun"])
def test_no_end_of_the_straight_path_is_singular(prediction: str, clip: bool, integrator: str) -> None:
    objective = Diffusion(Denoiser(), path="straight", prediction=prediction)  # type: ignore[arg-type]
    params = objective.init(jax.random.key(0), BATCH)["params"]
    options = Sampling(integrator, steps=4, clip_denoised=clip)  # type: ignore[arg-type]
    images = make_sampler(options, objective, SHAPE)(params, jnp.arange(2), jnp.zeros((2,), jnp.int32))
    assert jnp.isfinite(images).all()
    assert not clip or jnp.abs(images).max() < 1.0 + 1e-5


def test_bfloat16_models_sample_in_float32() -> None:
    exact = _draw(Sampling("ddim", steps=4), [0, 1], [0, 1])
    half = _draw(Sampling("ddim", steps=4), [0, 1], [0, 1], half=True)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, exact, atol=0.05)
    assert np.abs(half - exact).max() > 0.0


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"integrator": "ddpm"}, "straight", r"^integrator='ddpm': path='straight' .*'euler' or 'heun'$"),
        ({"integrator": "ddim"}, "straight", r"^integrator='ddim': "),
        ({"steps": 1}, "ddpm-linear", r"^steps=1: .*2 to 1000"),
        ({"steps": 1001}, "ddpm-linear", r"^steps=1001: .*2 to 1000"),
        ({"steps": 0, "integrator": "euler"}, "straight", r"^steps=0: "),
        ({"guidance_scale": -1.0}, "ddpm-linear", r"^guidance_scale=-1.0: "),
        ({"guidance_channels": 0}, "ddpm-linear", r"^guidance_channels=0: "),
        ({"guidance_channels": 3}, "ddpm-linear", r"^guidance_channels=3: samples have 2 channels"),
        ({"integrator": "rk4"}, "ddpm-linear", r"^integrator='rk4': must be one of ddpm, ddim, euler, heun$"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_sampler(Sampling(**options), Diffusion(Denoiser(), path=path), SHAPE)  # type: ignore[arg-type]


def test_guidance_needs_a_trained_null_label() -> None:
    with pytest.raises(UserError, match=r"^guidance_scale=2.0: .*condition_dropout=0"):
        make_sampler(Sampling(guidance_scale=2.0), Diffusion(Denoiser(), condition_dropout=0.0), SHAPE)


def test_uint8_truncates_and_inverts_the_scaling() -> None:
    pixels = np.arange(256, dtype=np.uint8)
    scaled = jnp.asarray(pixels, jnp.float32) / 127.5 - 1.0
    np.testing.assert_array_equal(to_uint8(scaled), pixels)
    assert to_uint8(jnp.array([-9.0, 9.0, 0.0, 0.0077])).tolist() == [0, 255, 128, 128]  # 128.98 is truncated
