"""Trained autoencoders as tools, which encode images and decode generated latents."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from scaling import data
from scaling.errors import UserError
from scaling.models import vae
from scaling.models.base import HasMoments
from scaling.objectives.base import Helpers
from scaling.run.build import AUTOENCODER, Run, helper_shapes
from scaling.run.restore import on_host, restore_run, weights_digest
from scaling.validation import parse_dataclass


@dataclass(frozen=True)
class RestoredAutoencoder:
    """The model of an autoencoder's run, and the weights that it is evaluated with."""

    model: Any
    params: Any  # float32 arrays on this host
    digest: str  # digest of the weights, which must be the same for latents and decoder

    def moments(self, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log-variance [B, ..., h, w, Z] of images [B, H, W, C], or of a clip's frames."""
        return _framewise(lambda x: self.model.apply({"params": params}, x, method="moments"), x)


def restore_autoencoder(folder: Path | str) -> RestoredAutoencoder:
    """Restores the autoencoder of a run folder.

    Raises:
        UserError: if the run has none.
    """
    restored = restore_run(folder)
    run = restored.run
    if not isinstance(run.model, HasMoments):
        family = run.config.model.name
        raise UserError(
            f"run={folder}: is a run of {family}, which has no latent; give one of the family vae"
        )
    params = on_host(restored.weights["params"])
    return RestoredAutoencoder(run.model, params, weights_digest(params))


def decode(run: Run, helpers: Helpers, samples: jax.Array, tile: int | None = None) -> jax.Array:
    """Returns a run's samples as images [B, H, W, C] in [-1, 1], or clips [B, T, H, W, C].

    Pixels stay as they are. Latents are divided by their scale and decoded by the helper that encoded them,
    at once or in tiles of side `tile` that overlap by a quarter; those of clips frame by frame.
    """
    if run.info.latents is None:
        return samples

    def decode_all(z: jax.Array) -> jax.Array:
        return jnp.asarray(helpers[AUTOENCODER](z, method="decode"))

    def decode_tiles(z: jax.Array) -> jax.Array:
        return decode_all(z) if tile is None else vae.tiled_decode(decode_all, z, tile, tile // 4)

    return _framewise(decode_tiles, samples / run.info.latents.scale)


def _framewise(apply: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """Returns `apply(x)` for images x [B, H, W, C], or for all the frames of clips [B, T, H, W, C]."""
    clips = x.shape[:-3]
    out = apply(x.reshape(math.prod(clips), *x.shape[-3:]))
    return jax.tree.map(lambda y: y.reshape(*clips, *y.shape[1:]), out)


def decoded_shape(run: Run) -> tuple[int, ...]:
    """Returns the shape of an image that the run generates; of the autoencoder no weights are read.

    Raises:
        UserError: if the autoencoder is missing.
    """
    if run.info.latents is None:
        return run.image_shape
    helper = helper_shapes(run, AUTOENCODER)
    z = jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)
    decoded = jax.eval_shape(lambda helper, z: decode(run, {AUTOENCODER: helper}, z), helper, z)
    return tuple(decoded.shape[1:])


def images(run: Run) -> data.Data:
    """Returns the images that a run learns to generate: its own data, or those that its latents encode."""
    latents = run.info.latents
    return run.config.data if latents is None else parse_dataclass(data.Data, latents.data, "data")
