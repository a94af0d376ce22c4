"""Reconstruction and KL: by hand, exact under masks and shards, and that the small autoencoder learns."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scaling.data import Data, open_source
from scaling.errors import UserError
from scaling.models import vae
from scaling.objectives.autoencoder import Autoencoder, psnr
from scaling.objectives.base import Extras, Loss
from tests.support.checks import KEY, check_eight_devices, check_masked, images
from tests.support.running import jit

SIZE = 16


class Linear(nn.Module):
    """Moments and images by one matrix each."""

    def setup(self) -> None:
        self.enc, self.dec = nn.Dense(6), nn.Dense(1)

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = jnp.split(self.enc(x), 2, axis=-1)
        return mean, logvar

    def decode(self, z: jax.Array) -> jax.Array:
        return self.dec(z)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.moments(x)[0])


class Echo(nn.Module):
    """The latent is the image, with noise of a known size; and the image is the latent."""

    logvar: float = -2.0

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, jnp.full_like(x, self.logvar)

    def decode(self, z: jax.Array) -> jax.Array:
        return z


def _batch() -> dict[str, jax.Array]:
    return {"image": images(SIZE, channels=1)}


def _means(loss: Loss) -> dict[str, float]:
    return {name: float(loss.sums[name] / loss.counts[name]) for name in loss.sums}


@pytest.mark.parametrize("reconstruction", ["l1", "mse"])
def test_the_bound_by_hand(reconstruction: Any) -> None:
    batch = _batch()
    task = Autoencoder(Linear(), reconstruction=reconstruction, kl_weight=0.03)
    params = task.init(jax.random.key(0), batch)["params"]
    drawn: list[np.ndarray] = []

    class Kept(Linear):
        def decode(self, z: jax.Array) -> jax.Array:
            drawn.append(np.asarray(z, np.float64))
            return super().decode(z)

    found = Autoencoder(Kept(), task.reconstruction, task.kl_weight).loss(params, Extras(), batch, KEY, True)
    x = np.asarray(batch["image"], np.float64) / 127.5 - 1.0
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    mean, logvar = np.split(x @ p["enc"]["kernel"] + p["enc"]["bias"], 2, axis=-1)
    noise = (drawn[0] - mean) / np.exp(logvar / 2)
    assert noise.std() == pytest.approx(1.0, abs=0.08) and abs(noise.mean()) < 0.12
    out = drawn[0] @ p["dec"]["kernel"] + p["dec"]["bias"]
    error = np.abs(out - x) if reconstruction == "l1" else (out - x) ** 2
    posterior = Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(logvar / 2)))
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum((1, 2, 3)).numpy()
    mse = ((np.clip(out, -1, 1) - x) ** 2).mean((1, 2, 3))
    means = _means(found)
    assert set(means) == {"loss", "reconstruction", "kl", "psnr"}
    assert means["reconstruction"] == pytest.approx(error.mean(), rel=1e-4)
    assert means["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert means["loss"] == pytest.approx(error.mean() + 0.03 * kl.mean() / 16, rel=1e-4)
    assert means["psnr"] == pytest.approx((20 * np.log10(2 / np.sqrt(mse))).mean(), rel=1e-4)
    assert found.value == pytest.approx(means["loss"], rel=1e-6)


def test_draws_differ_between_examples_and_steps_but_not_between_training_and_evaluation() -> None:
    batch = {"image": jnp.full((SIZE, 4, 4, 1), 128, jnp.uint8)}
    task = Autoencoder(Echo(), "mse", kl_weight=0.0)

    def value(rows: slice, key: jax.Array, train: bool = True) -> float:
        mask = jnp.zeros(SIZE).at[rows].set(1.0)
        return float(task.loss({}, Extras(), {**batch, "mask": mask}, key, train).value)

    each = [value(slice(i, i + 1), KEY) for i in range(SIZE)]
    assert len(set(each)) == SIZE
    assert np.mean(each) == pytest.approx(np.exp(-2.0), rel=0.3)
    assert value(slice(0, SIZE), KEY) == value(slice(0, SIZE), KEY, train=False)
    assert value(slice(0, SIZE), KEY) != value(slice(0, SIZE), jax.random.key(8))


def test_psnr_is_clipped_to_the_range_of_pictures_and_at_most_100() -> None:
    real = jnp.full((3, 2, 2, 1), 1.0)
    made = jnp.stack([jnp.full((2, 2, 1), value) for value in (0.8, 7.0, 1.0)])
    np.testing.assert_allclose(psnr(made, real), [20.0, 100.0, 100.0], rtol=1e-5)


def test_a_padded_and_masked_batch_weighs_only_the_real_examples() -> None:
    check_masked(Autoencoder(Linear()), _batch(), {"loss", "reconstruction", "kl", "psnr"})


def test_eight_devices_give_the_loss_and_the_gradient_of_one() -> None:
    check_eight_devices(Autoencoder(Linear(), kl_weight=0.1), _batch())


@pytest.mark.slow
def test_the_small_autoencoder_learns_digits_within_a_few_steps() -> None:
    batch = {"image": jnp.asarray(open_source(Data(name="mnist"), "train").images[:8])}
    task = Autoencoder(vae.make("small"))
    params = jit(lambda key: task.init(key, batch))(jax.random.key(0))["params"]
    tx = optax.flatten(optax.adam(3e-3))  # one array compiles faster

    @jit
    def step(params: Any, state: Any, at: jax.Array) -> tuple[Any, Any, Any]:
        def value(params: Any) -> tuple[jax.Array, Loss]:
            loss = task.loss(params, Extras(), batch, jax.random.fold_in(KEY, at), True)
            return loss.value, loss

        grads, loss = jax.grad(value, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
    losses = []
    for at in range(20):
        params, state, loss = step(params, state, jnp.asarray(at))
        losses.append(_means(loss))
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]
    assert losses[-1]["psnr"] > losses[0]["psnr"] + 3
    assert losses[-1]["kl"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruction": "l2"}, "reconstruction='l2': must be one of l1, mse"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0: must be at least 0"),
        ({"kl_weight": float("nan")}, "kl_weight=nan: must be at least 0"),
        ({"model": nn.Dense(3)}, "model=Dense: has no latent; the objective autoencoder is for"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Autoencoder(**{"model": Linear(), **options})
