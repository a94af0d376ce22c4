"""Clips [B, T, H, W, C] through diffusion: trained, sampled, drawn as animations, in pixels and latents."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from scaling import models
from scaling.data import Data, eval_batches, open_source
from scaling.evaluators import autoencoder
from scaling.objectives.base import Extras
from scaling.objectives.diffusion import Diffusion
from scaling.run import build, restore
from scaling.run.folder import read_events
from scaling.run.helpers import RunHelpers
from scaling.training import config, encode, evaluate, loop
from tests.support import clip_denoiser
from tests.support.run_folders import write_run

SUPPORT = Path(__file__).parents[1] / "support"
TINY = str(SUPPORT / "tiny_clips.py")


@pytest.fixture(autouse=True)
def registered(counting: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "clip_denoiser", clip_denoiser.FAMILY)


def frames_of(path: Path) -> tuple[int, tuple[int, int]]:
    with Image.open(path) as picture:
        return getattr(picture, "n_frames", 1), picture.size


def test_clips_are_trained_sampled_and_drawn_as_an_animation(tmp_path: Path) -> None:
    loop.train(config.load(TINY), tmp_path / "run")
    assert read_events(tmp_path / "run")[-1]["values"].keys() == {"val_loss", "val_mse"}
    (grid,) = (tmp_path / "run/samples").iterdir()
    assert frames_of(grid) == (4, (2 + 3 * 10, 2 + 2 * 10))
    evaluate.sample(tmp_path / "run", tmp_path / "grid.png", tmp_path / "clips.npz", 6, 8, {})
    with np.load(tmp_path / "clips.npz") as arrays:
        clips, labels = arrays["images"], arrays["labels"]
    assert clips.shape == (6, 4, 8, 8, 3) and labels.tolist() == [0, 1, 2, 0, 1, 2]
    with Image.open(tmp_path / "grid.png") as picture:
        for i in range(4):
            picture.seek(i)
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB"))[2:10, 2:10], clips[0, i])


def test_the_variance_of_clips_is_learned_too() -> None:
    """The loss of a clip is that of its frames side by side as one image, for a model that mixes nothing."""

    class Pointwise(nn.Module):
        num_classes: int = 3
        learn_sigma: bool = True

        def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.tanh(x), jnp.sin(x)], axis=-1)

    clips = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 4, 2, 2, 1)), jnp.uint8)
    label = jnp.arange(3, dtype=jnp.int32)
    wide = clips.reshape(3, 8, 2, 1)  # the same noise, number by number

    @jax.jit
    def loss(x: jax.Array) -> Any:
        batch = {"image": x, "label": label}
        return Diffusion(Pointwise()).loss({}, Extras(), batch, jax.random.key(1), True)

    found, expected = loss(clips), loss(wide)
    assert found.sums.keys() == {"loss", "mse", "vb"}
    for name in found.sums:
        np.testing.assert_allclose(found.sums[name], expected.sums[name], rtol=1e-6)


def test_latents_of_clips_are_those_of_their_frames(tmp_path: Path) -> None:
    colours = {f"{split}_images": np.zeros((16, 8, 8, 3), np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "colours.npz", **colours, train_labels=np.arange(16), test_labels=np.arange(16))
    overrides: dict[str, Any] = {"data.name": "npz", "data.data_dir": str(tmp_path / "colours.npz")}
    overrides |= {"model.channels": 3, "model.widths": (4,)}
    images = build.build(config.load(str(SUPPORT / "tiny_vae.py"), overrides))
    write_run(images, tmp_path / "vae")
    cfg = config.load(TINY)
    encode.encode(tmp_path / "vae", cfg, tmp_path / "latents", 8)
    given = {"data.name": "latents", "data.data_dir": str(tmp_path / "latents")}
    given |= dict.fromkeys(("data.train_transforms", "data.eval_transforms"), ())
    latent = config.load(TINY, {**given, "data.image_size": None})

    vae = restore.restore_run(tmp_path / "vae")
    source: Any = open_source(latent.data, "test")
    assert source.image_shape == (4, 8, 8, 3)
    one = build.build(cfg, jax.devices()[:1])
    clip = next(eval_batches(cfg.data, "test", 5, one.batch_sharding()))["image"][2]  # [T, H, W, C]
    moments = source.records(np.array([2]))["moments"][0]  # [views, 2, T, h, w, Z]
    of_frames = jax.jit(lambda x: vae.run.model.apply({"params": vae.weights["params"]}, x, method="moments"))
    for view, shown in enumerate((clip, clip[:, :, ::-1])):
        expected = np.stack(of_frames(jnp.asarray(shown, jnp.float32) / 127.5 - 1))
        np.testing.assert_allclose(moments[view].astype(np.float32), expected, rtol=2**-10, atol=1e-5)

    loop.train(latent, tmp_path / "run")
    (grid,) = (tmp_path / "run/samples").iterdir()
    assert frames_of(grid) == (4, (2 + 3 * 10, 2 + 2 * 10))
    run = restore.restore_run(tmp_path / "run").run
    helpers, z = RunHelpers(run).all(), jax.random.normal(jax.random.key(0), (2, 4, 8, 8, 3))
    assert autoencoder.decoded_shape(run) == (4, 8, 8, 3) and run.info.latents is not None
    apply = jax.jit(lambda z: vae.run.model.apply({"params": vae.weights["params"]}, z, method="decode"))
    each = jnp.stack([apply(z[:, i] / run.info.latents.scale) for i in range(4)], axis=1)
    found = jax.jit(lambda helpers, z: autoencoder.decode(run, helpers, z))(helpers, z)
    np.testing.assert_allclose(found, each, rtol=1e-3, atol=1e-4)
