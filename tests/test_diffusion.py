from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import norm

from scaling import diffusion
from scaling.diffusion import PATHS, Chain, Straight
from scaling.errors import UserError

LINEAR = PATHS["ddpm-linear"]
COSINE = PATHS["ddpm-cosine"]
STRAIGHT = PATHS["straight"]
assert isinstance(LINEAR, Chain) and isinstance(COSINE, Chain) and isinstance(STRAIGHT, Straight)

_vlb = jax.jit(partial(diffusion.vlb, LINEAR))


def _images(seed: int, batch: int = 6) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, 4, 4, 3))


def _spread(name: str) -> jax.Array:
    """Six positions [6, 1, 1, 1] along a path, away from singular ends."""
    where = jnp.linspace(0.002, 0.998, 6) if name == "straight" else jnp.array([0, 1, 10, 400, 900, 999])
    return where[:, None, None, None]


@pytest.mark.parametrize(
    ("name", "schedule"), [("ddpm-linear", "linear"), ("ddpm-cosine", "squaredcos_cap_v2")]
)
def test_betas_are_the_published_ones(name: str, schedule: str) -> None:
    reference = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=schedule)
    chain = PATHS[name]
    assert isinstance(chain, Chain)
    np.testing.assert_allclose(chain.betas, reference.betas.numpy(), rtol=1e-5)
    np.testing.assert_allclose(chain.alpha_bar, reference.alphas_cumprod.numpy(), rtol=5e-5)


def test_linear_betas_exactly() -> None:
    assert LINEAR.alpha_bar.dtype == np.float64
    betas = np.array([1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)])
    np.testing.assert_allclose(LINEAR.betas, betas, rtol=1e-10)
    # A float32 product is off in the fourth digit.
    assert LINEAR.alpha_bar[-1] == pytest.approx(np.exp(np.log1p(-betas).sum()), rel=1e-12)


@pytest.mark.parametrize("steps", [1000, 250, 50, 10])
def test_learned_variance_and_posterior_mean_match_diffusers(steps: int) -> None:
    reference = DDPMScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace", clip_sample=False)
    reference.alphas_cumprod = torch.from_numpy(LINEAR.alpha_bar)  # float64: the test is of the formulas
    reference.set_timesteps(steps)
    chain = LINEAR.respaced(steps)
    assert chain.times[::-1].tolist() == reference.timesteps.tolist()
    x_t, raw, x = np.random.default_rng(0).normal(size=(3, 2, 4, 4, 3))
    for i in (1, 2, steps // 2, steps - 1):
        t = int(chain.times[i])
        learned = reference._get_variance(t, torch.from_numpy(raw), variance_type="learned_range")
        ours = chain.log_variance(jnp.int32(i), jnp.asarray(raw, jnp.float32))
        np.testing.assert_allclose(ours, learned.numpy(), rtol=2e-6)
        fixed = reference._get_variance(t, variance_type="fixed_large")
        assert chain.log_variance(jnp.int32(i), None) == pytest.approx(np.log(fixed.item()), rel=1e-6)
        eps = torch.from_numpy((x_t - np.sqrt(LINEAR.alpha_bar[t]) * x) / np.sqrt(1.0 - LINEAR.alpha_bar[t]))
        stepped = reference.step(eps, t, torch.from_numpy(x_t), generator=torch.manual_seed(0)).prev_sample
        drawn = torch.randn(eps.shape, generator=torch.manual_seed(0), dtype=torch.float64)
        mean = stepped - reference._get_variance(t) ** 0.5 * drawn
        ours = chain.posterior_mean(jnp.int32(i), jnp.asarray(x, jnp.float32), jnp.asarray(x_t, jnp.float32))
        np.testing.assert_allclose(ours, mean.numpy(), atol=2e-6)


def test_respacing_keeps_both_ends_and_rejects_other_counts() -> None:
    assert LINEAR.respaced(250).times[[0, 1, 2, -1]].tolist() == [0, 4, 8, 999]
    assert LINEAR.respaced(7).times.tolist() == [0, 166, 333, 500, 666, 832, 999]  # 166.5 and 832.5 are ties
    for steps in (0, 1, 1001):
        with pytest.raises(UserError, match=rf"^steps={steps}: .*2 to 1000"):
            LINEAR.respaced(steps)
    with pytest.raises(UserError, match=r"^steps=0"):
        STRAIGHT.nodes(0)


def test_straight_has_its_data_at_one() -> None:
    x, eps = _images(0), _images(1)
    for t, expected in ((0.0, eps), (1.0, x), (0.25, 0.25 * x + 0.75 * eps)):
        point = STRAIGHT.point(jnp.float32(t))
        np.testing.assert_allclose(diffusion.noised(x, eps, point), expected, atol=1e-6)
    np.testing.assert_array_equal(diffusion.target("v", x, eps, STRAIGHT.point(jnp.float32(0.3))), x - eps)
    assert STRAIGHT.time(jnp.float32(0.3)) == jnp.float32(0.3)


def test_chain_velocity_is_salimans_and_hos() -> None:
    x, eps = _images(0), _images(1)
    reference = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    where = _spread("ddpm-linear")
    ours = diffusion.target("v", x, eps, LINEAR.point(where))
    indices = torch.from_numpy(np.array(where).reshape(-1))
    theirs = reference.get_velocity(torch.from_numpy(np.array(x)), torch.from_numpy(np.array(eps)), indices)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", list(PATHS))
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_estimates_invert_targets(name: str, prediction: str) -> None:
    x, eps = _images(0), _images(1)
    point = PATHS[name].point(_spread(name))
    x_t = diffusion.noised(x, eps, point)
    found = diffusion.estimates(prediction, diffusion.target(prediction, x, eps, point), x_t, point)
    # A rounding error of x_t is divided by alpha in x and by sigma in eps.
    for ours, exact, scale in zip(found, (x, eps), (point.alpha, point.sigma), strict=True):
        assert (jnp.abs(ours - exact) < 1e-6 + 1e-6 / jnp.minimum(scale, 1.0)).all()


@pytest.mark.parametrize("name", list(PATHS))
def test_min_snr_is_one_weighting_of_the_error_of_x(name: str) -> None:
    point = PATHS[name].point(_spread(name)[2:5])
    x, eps, wrong = _images(0, 3), _images(1, 3), _images(2, 3)
    x_t = diffusion.noised(x, eps, point)
    wrong_eps = (x_t - point.alpha * wrong) / point.sigma
    expected = jnp.minimum((point.alpha / point.sigma) ** 2, 5.0) * (wrong - x) ** 2
    for prediction in diffusion.PREDICTIONS:
        returned = diffusion.target(prediction, wrong, wrong_eps, point)
        error = returned - diffusion.target(prediction, x, eps, point)
        weighted = diffusion.weight("min-snr", prediction, point) * error**2
        np.testing.assert_allclose(weighted, expected, rtol=1e-3, atol=1e-4)
        assert (diffusion.weight("uniform", prediction, point) == 1.0).all()


def test_min_snr_is_finite_at_the_ends_of_the_straight_path() -> None:
    weights = diffusion.weight("min-snr", "v", STRAIGHT.point(jnp.array([0.0, 1.0])))
    np.testing.assert_array_equal(weights, [0.0, 0.0])


def _naive_bound(t: int, x: np.ndarray, x_t: np.ndarray, x_hat: np.ndarray, raw: np.ndarray) -> float:
    """The bound's term by the textbook, in float64: densities of the chain multiplied out one by one."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]

    def product(last: int) -> float:
        return float(np.prod([1.0 - beta for beta in betas[: last + 1]]))

    def variance(i: int) -> float:
        return betas[i] * (1.0 - product(i - 1)) / (1.0 - product(i))

    def mean(data: np.ndarray) -> np.ndarray:
        from_x = np.sqrt(product(t - 1)) * betas[t] / (1.0 - product(t))
        return from_x * data + np.sqrt(1.0 - betas[t]) * (1.0 - product(t - 1)) / (1.0 - product(t)) * x_t

    smallest = variance(max(t, 1))
    log_variance = (raw + 1) / 2 * np.log(betas[t]) + (1 - (raw + 1) / 2) * np.log(smallest)
    if t:
        ratio = smallest / np.exp(log_variance)
        terms = 0.5 * (ratio - 1.0 - np.log(ratio) + (mean(x) - mean(x_hat)) ** 2 / np.exp(log_variance))
    else:
        sigma = np.exp(0.5 * log_variance)
        above = np.where(x > 0.999, np.inf, x + 1 / 255)
        below = np.where(x < -0.999, -np.inf, x - 1 / 255)
        inside = norm.cdf(above, mean(x_hat), sigma) - norm.cdf(below, mean(x_hat), sigma)
        terms = -np.log(inside)
    return float(terms.mean() / np.log(2.0))


def _bound_inputs() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    x = np.round(rng.uniform(0, 255, size=(5, 4, 4, 3))) / 127.5 - 1.0
    x[0, 0, 0], x[0, 0, 1] = -1.0, 1.0  # the open bins
    eps, raw = rng.normal(size=x.shape), rng.uniform(-1.5, 1.5, size=x.shape)
    where = np.array([0, 1, 2, 500, 999])
    alpha_bar = LINEAR.alpha_bar[where][:, None, None, None]
    x_t = np.sqrt(alpha_bar) * x + np.sqrt(1.0 - alpha_bar) * eps
    x_hat = x + 0.01 * rng.normal(size=x.shape)
    return where, x, x_t, x_hat, raw


def test_bound_matches_a_naive_float64_form() -> None:
    where, *arrays = _bound_inputs()
    expected = [_naive_bound(int(t), *(a[i] for a in arrays)) for i, t in enumerate(where)]
    x, x_t, x_hat, raw = (jnp.asarray(a, jnp.float32) for a in arrays)
    ours = _vlb(jnp.asarray(where)[:, None, None, None], x, x_t, x_hat, raw)
    np.testing.assert_allclose(ours[1:], expected[1:], rtol=1e-4, atol=1e-6)
    # The decoder's normal distribution is the family's tanh approximation, good to 3e-4 of a probability.
    np.testing.assert_allclose(ours[0], expected[0], rtol=5e-3)


def test_decoder_probabilities_of_all_bins_sum_to_one() -> None:
    x = (jnp.arange(256, dtype=jnp.float32) / 127.5 - 1.0)[:, None]
    for mean, sigma in ((0.0, 0.01), (0.98, 0.05), (-1.0, 0.3)):
        log = diffusion.decoder_log_likelihood(x, jnp.full((256, 1), mean), jnp.full((256, 1), np.log(sigma)))
        assert jnp.exp(log).sum() == pytest.approx(1.0, abs=1e-4)


def test_bound_trains_the_variance_and_not_the_mean() -> None:
    where, *arrays = _bound_inputs()
    x, x_t, x_hat, raw = (jnp.asarray(a, jnp.float32) for a in arrays)
    at = jnp.asarray(where)[:, None, None, None]
    through_mean, through_raw = jax.grad(
        lambda mean, variance: _vlb(at, x, x_t, mean, variance).sum(), argnums=(0, 1)
    )(x_hat, raw)
    assert (through_mean == 0.0).all()
    assert jnp.isfinite(through_raw).all()
    assert (jnp.abs(through_raw).sum(axis=(1, 2, 3)) > 0.0).all()


def test_nodes_of_a_chain_are_its_angles() -> None:
    nodes = LINEAR.nodes(10)
    assert nodes.tau.shape == (11,) and nodes.tau[-1] == 0.0 and (np.diff(nodes.tau) < 0.0).all()
    np.testing.assert_allclose(nodes.point.alpha, np.cos(nodes.tau[:-1]), rtol=1e-5)
    np.testing.assert_array_equal(nodes.time, LINEAR.respaced(10).times[::-1])
