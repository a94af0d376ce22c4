"""How pixels become what weights see: against torch, and for every objective that sees images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from scaling import objectives
from scaling.errors import UserError
from scaling.models import dit, vae, vit
from scaling.objectives.base import Extras
from scaling.preprocessing import IMAGENET, OPENAI, SYMMETRIC, Preprocessing

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)


@pytest.mark.parametrize("preprocessing", [SYMMETRIC, IMAGENET, OPENAI, Preprocessing((0.1,), (2.0,))])
def test_pixels_are_normalised_as_in_torch(preprocessing: Preprocessing) -> None:
    """As torchvision's ToTensor and Normalize: divided by 255, less the mean, by the deviation."""
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in (preprocessing.mean, preprocessing.std))
    expected = (torch.from_numpy(PIXELS).double() / 255 - mean) / std
    out = jax.jit(preprocessing)(jnp.asarray(PIXELS))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected.numpy(), atol=1e-6)
    clip = jnp.asarray(np.tile(PIXELS[:, None], (1, 3, 1, 1, 1)))  # of a video each frame alike
    np.testing.assert_array_equal(jax.jit(preprocessing)(clip)[:, 1], out)
    low, high = preprocessing.range()
    ends = preprocessing(jnp.asarray(np.stack([np.zeros((4, 3)), np.full((4, 3), 255)]).astype(np.uint8)))
    assert (low, high) == (pytest.approx(float(ends.min())), pytest.approx(float(ends.max())))


def test_latents_are_not_normalised() -> None:
    latents = jnp.asarray(PIXELS, jnp.float32)
    np.testing.assert_array_equal(IMAGENET(latents), latents)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((), (), r"mean=\(\): must be one finite number, or one for each channel"),
        ((0.5, float("nan"), 0.5), (1.0,) * 3, "mean=.*must be one finite"),
        ((0.5,), (0.0,), r"std=\(0\.0,\): must be one number greater than 0"),
        ((0.5,), (1.0, 1.0, 1.0), r"std=.*: must be as many numbers as mean=\(0\.5,\)"),
    ],
)
def test_bad_numbers_are_named(mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preprocessing(mean, std)


def test_as_many_numbers_as_channels() -> None:
    for channels in (1, 3):
        SYMMETRIC.require_channels(channels)
    IMAGENET.require_channels(3)
    with pytest.raises(
        UserError, match=r"mean=\(0\.485, .*\): images have 1 channels; give one number for each"
    ):
        IMAGENET.require_channels(1)


def test_a_classifier_sees_normalised_pixels() -> None:
    """Loss, logits and features of raw pixels are those of pixels that were normalised before."""
    model = vit.make("A/14", resolution=28, num_classes=4)
    x = np.random.default_rng(1).integers(0, 256, (3, 28, 28, 3)).astype(np.uint8)
    batch = {"image": jnp.asarray(x), "label": jnp.arange(3, dtype=jnp.int32)}
    task = objectives.make("classification", model, IMAGENET)
    params = task.init(jax.random.key(0), batch)["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    before = {**batch, "image": jnp.asarray((x / 255 - IMAGENET.mean) / IMAGENET.std, jnp.float32)}
    for call in (task.logits, task.features):
        out, expected = call(params, Extras(), batch), call(params, Extras(), before)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        symmetric = getattr(objectives.make("classification", model), call.__name__)(params, Extras(), batch)
        assert np.abs(np.asarray(out - symmetric)).max() > 1e-2
    losses = [task.loss(params, Extras(), b, jax.random.key(0), train).value for b in (batch, before)
              for train in (True, False)]  # fmt: skip
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "model"),
    [("diffusion", dit.make("A/14", learn_sigma=False)), ("autoencoder", vae.make("small"))],
)
def test_what_makes_images_makes_them_in_one_range(name: str, model: object) -> None:
    options = {"path": "straight", "prediction": "v"} if name == "diffusion" else {}
    objectives.make(name, model, SYMMETRIC, **options)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=rf"{name}: generates images in \[-1, 1\]; leave out preprocessing\.mean"
    ):
        objectives.make(name, model, IMAGENET, **options)  # type: ignore[arg-type]
