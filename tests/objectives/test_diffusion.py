from typing import Any, get_args, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling import diffusion
from scaling.errors import UserError
from scaling.objectives import make
from scaling.objectives.base import Extras, Loss
from scaling.objectives.diffusion import Diffusion
from tests.support.checks import KEY, Denoiser, check_eight_devices, check_masked, images

SIZE = 32


class Recorder(nn.Module):
    """Returns zeros, or its input, and stores what it was asked."""

    num_classes: int = 5
    learn_sigma: bool = False
    echo: bool = False

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        CALLS.append((x, t, y))
        out = x if self.echo else jnp.zeros_like(x)
        return jnp.concatenate([out, jnp.full_like(x, 0.25)], axis=-1) if self.learn_sigma else out


CALLS: list[tuple[jax.Array, jax.Array, jax.Array]] = []


def _batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "image": images(SIZE, channels=2),
        "label": jnp.asarray(rng.integers(0, 5, size=SIZE), jnp.int32),
    }


def _asked(
    task: Diffusion, batch: dict[str, jax.Array], train: bool = True, **extras: Any
) -> tuple[Loss, tuple]:
    CALLS.clear()
    loss = task.loss({}, Extras(**extras), batch, KEY, train)
    assert len(CALLS) == 1
    return loss, tuple(np.asarray(a) for a in CALLS[0])


def test_dits_objective_by_hand() -> None:
    """eps error plus the bound's term, recomputed from what the model was given and what it returned."""
    batch = _batch()
    task = Diffusion(Recorder(learn_sigma=True))
    found, (x_t, t, _) = _asked(task, batch)
    x = np.asarray(batch["image"], np.float64) / 127.5 - 1.0
    alpha_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[t.astype(int)][:, None, None, None]
    eps = (x_t - np.sqrt(alpha_bar) * x) / np.sqrt(1.0 - alpha_bar)
    assert eps.std() == pytest.approx(1.0, abs=0.08) and abs(eps.mean()) < 0.12
    assert set(found.sums) == {"loss", "mse", "vb"}
    assert found.sums["mse"] / found.counts["mse"] == pytest.approx((eps**2).mean(), rel=1e-4)
    chain = diffusion.PATHS["ddpm-linear"]
    assert isinstance(chain, diffusion.Chain)
    x_hat = x_t / np.sqrt(alpha_bar)  # the model said that eps is 0
    arrays = (jnp.asarray(a, jnp.float32) for a in (x, x_t, x_hat, np.full_like(x, 0.25)))
    bound = diffusion.vlb(chain, jnp.asarray(t, jnp.int32)[:, None, None, None], *arrays)
    assert found.sums["vb"] == pytest.approx(float(bound.sum()), rel=1e-4)
    assert found.value == pytest.approx((eps**2).mean() + float(bound.mean()), rel=1e-4)


def test_sits_objective_by_hand() -> None:
    batch = _batch()
    task = Diffusion(Recorder(echo=True), path="straight", prediction="v")
    found, (x_t, t, _) = _asked(task, batch)
    x, t = np.asarray(batch["image"], np.float64) / 127.5 - 1.0, t[:, None, None, None].astype(np.float64)
    assert (t >= 0.0).all() and (t <= 1.0).all() and len(np.unique(t)) == SIZE
    sure = t[:, 0, 0, 0] < 0.95
    eps = (x_t[sure] - t[sure] * x[sure]) / (1.0 - t[sure])
    assert eps.std() == pytest.approx(1.0, abs=0.08)
    velocity = (x - x_t) / (1.0 - t)
    assert found.value == pytest.approx(((x_t - velocity) ** 2).mean(), rel=1e-3)
    assert set(found.sums) == {"loss", "mse"}


def test_times_and_noise_differ_between_examples_and_steps() -> None:
    batch = {"image": jnp.full((SIZE, 4, 4, 2), 128, jnp.uint8), "label": jnp.zeros((SIZE,), jnp.int32)}
    task = Diffusion(Recorder())
    _, (x_t, t, _) = _asked(task, batch)
    assert len(np.unique(t)) > SIZE - 5 and (t == np.round(t)).all() and t.min() >= 0 and t.max() <= 999
    assert len({image.tobytes() for image in x_t}) == SIZE
    CALLS.clear()
    task.loss({}, Extras(), batch, jax.random.key(8), True)
    assert (np.asarray(CALLS[0][1]) != t).any() and (np.asarray(CALLS[0][0]) != x_t).any()


def test_labels_are_dropped_to_the_null_row_at_the_rate() -> None:
    batch = {"image": jnp.zeros((4000, 1, 1, 1), jnp.uint8), "label": jnp.arange(4000, dtype=jnp.int32) % 5}
    task = Diffusion(Recorder(), path="straight", prediction="v", condition_dropout=0.1)
    _, (_, t, y) = _asked(task, batch)
    dropped = y == 5
    assert dropped.mean() == pytest.approx(0.1, abs=0.02)  # four standard errors
    np.testing.assert_array_equal(y[~dropped], np.asarray(batch["label"])[~dropped])
    assert abs(np.corrcoef(dropped, t)[0, 1]) < 0.07  # drawn apart from the times
    _, (_, _, y) = _asked(task, batch, traced_hparams={"condition_dropout": jnp.float32(0.5)})
    assert (y == 5).mean() == pytest.approx(0.5, abs=0.04)
    _, (_, _, y) = _asked(task, batch, train=False)
    assert (y != 5).all()
    for rate, share in ((0.0, 0.0), (1.0, 1.0)):
        _, (_, _, y) = _asked(Diffusion(Recorder(), condition_dropout=rate), batch)
        assert (y == 5).mean() == share


def test_float_images_are_latents_and_stay_as_they_are() -> None:
    latents = 3.0 * jax.random.normal(jax.random.key(1), (SIZE, 4, 4, 2))
    batch = {"image": latents, "label": jnp.zeros((SIZE,), jnp.int32)}
    task = Diffusion(Recorder(), path="straight", prediction="x")
    found, _ = _asked(task, batch)
    assert found.value == pytest.approx(float((latents**2).mean()), rel=1e-5)


@pytest.mark.parametrize("path", list(diffusion.PATHS))
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
@pytest.mark.parametrize("weighting", diffusion.WEIGHTINGS)
def test_every_combination_has_a_finite_loss_and_gradient(path: Any, prediction: Any, weighting: Any) -> None:
    task = make(
        "diffusion",
        Denoiser(learn_sigma=path != "straight"),
        path=path,
        prediction=prediction,
        weighting=weighting,
    )
    batch = _batch()
    params = task.init(jax.random.key(0), batch)["params"]

    def value(p: Any) -> tuple[jax.Array, Loss]:
        loss = task.loss(p, Extras(), batch, KEY, True)
        return loss.value, loss

    (_, loss), gradient = jax.value_and_grad(value, has_aux=True)(params)
    assert jnp.isfinite(loss.value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    main = loss.value - (loss.sums["vb"] / SIZE if "vb" in loss.sums else 0.0)
    assert (main == pytest.approx(float(loss.sums["mse"]) / SIZE, rel=1e-4)) == (weighting == "uniform")


def test_a_padded_and_masked_batch_weighs_only_the_real_examples() -> None:
    check_masked(Diffusion(Denoiser(learn_sigma=True)), _batch(), {"loss", "mse", "vb"})


@pytest.mark.parametrize("path", ["ddpm-linear", "straight"])
def test_eight_devices_give_the_loss_and_the_gradient_of_one(path: Any) -> None:
    check_eight_devices(
        Diffusion(Denoiser(learn_sigma=path != "straight"), path=path, condition_dropout=0.3), _batch()
    )


def test_bfloat16_models_train_on_a_float32_loss() -> None:
    batch = _batch()
    exact, half = (Diffusion(Denoiser(learn_sigma=True, half=half)) for half in (False, True))
    params = exact.init(jax.random.key(0), batch)["params"]
    found = half.loss(params, Extras(), batch, KEY, True)
    assert found.value.dtype == jnp.float32
    assert found.value == pytest.approx(float(exact.loss(params, Extras(), batch, KEY, True).value), rel=0.02)


def test_the_loss_has_a_forward_derivative() -> None:
    task, batch = Diffusion(Denoiser(learn_sigma=True)), _batch()
    params = task.init(jax.random.key(0), batch)["params"]
    value = jax.jit(lambda p: task.loss(p, Extras(), batch, KEY, True).value)
    _, slope = jax.jvp(value, (params,), (params,))
    assert jnp.isfinite(slope)


def test_option_types_list_what_there_is() -> None:
    hints = get_type_hints(Diffusion)
    assert get_args(hints["path"]) == tuple(diffusion.PATHS)
    assert get_args(hints["prediction"]) == diffusion.PREDICTIONS
    assert get_args(hints["weighting"]) == diffusion.WEIGHTINGS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "curved"}, r"^path='curved': must be one of ddpm-linear, ddpm-cosine, straight$"),
        ({"prediction": "score"}, r"^prediction='score': must be one of eps, x, v$"),
        ({"weighting": "p2"}, r"^weighting='p2': must be one of uniform, min-snr$"),
        ({"condition_dropout": 1.5}, r"^condition_dropout=1.5: must be in \[0, 1\]$"),
        (
            {"path": "straight", "prediction": "v"},
            r"^model.learn_sigma=True: objective.path='straight' .*False",
        ),
        ({"dropout": 0.1}, r"^dropout=0.1: not an option of diffusion, which has path, "),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("diffusion", Denoiser(learn_sigma=True), **options)
