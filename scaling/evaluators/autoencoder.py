"""Trained autoencoders as tools, which encode images and decode generated latents."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from scaling import data
from scaling.errors import UserError
from scaling.models import vae
from scaling.run.build import Run
from scaling.run.restore import on_host, restore_run, weights_digest
from scaling.validation import parse_dataclass


@dataclass(frozen=True)
class RestoredAutoencoder:
    """The model of an autoencoder's run, and the weights that it is evaluated with."""

    model: Any
    params: Any  # float32 arrays on this host
    digest: str  # digest of the weights, which must be the same for latents and decoder


def restore_autoencoder(folder: Path | str) -> RestoredAutoencoder:
    """Restores the autoencoder of a run folder.

    Raises:
        UserError: if the run has none.
    """
    restored = restore_run(folder)
    run = restored.run
    if not hasattr(run.model, "moments"):
        family = run.config.model.name
        raise UserError(
            f"run={folder}: is a run of {family}, which has no latent; give one of the family vae"
        )
    params = on_host(restored.weights["params"])
    return RestoredAutoencoder(run.model, params, weights_digest(params))


@dataclass(frozen=True)
class Decoder:
    """A function from a run's samples to images [B, H, W, C] in [-1, 1]; pixels stay as they are.

    Latents are divided by their scale and decoded. The weights are an argument, so that compiled code does
    not contain them.
    """

    shape: tuple[int, ...]  # [H, W, C] of the images
    model: Any = None  # autoencoder; None for samples that are pixels
    params: Any = field(default=None, compare=False)  # weights of the autoencoder, replicated
    scale: float = 1.0  # factor by which the latents were multiplied

    def __call__(self, params: Any, x: jax.Array, tile: int | None = None) -> jax.Array:
        """Decodes samples x: latents at once, or in tiles of side `tile` that overlap by a quarter."""
        if self.model is None:
            return x

        def decode(z: jax.Array) -> jax.Array:
            return jnp.asarray(self.model.apply({"params": params}, z, method="decode"))

        z = x / self.scale
        return decode(z) if tile is None else vae.tiled_decode(decode, z, tile, tile // 4)


_DECODERS: WeakKeyDictionary[Run, Decoder] = WeakKeyDictionary()  # their weights go with the run


def decoder(run: Run) -> Decoder:
    """Returns the decoder of a run's samples, with its weights on all of the run's devices.

    Raises:
        UserError: if the autoencoder is missing, or is no longer the one that encoded the data.
    """
    if run not in _DECODERS:
        _DECODERS[run] = _restore_decoder(run)
    return _DECODERS[run]


def _restore_decoder(run: Run) -> Decoder:
    latents = run.info.latents
    if latents is None:
        return Decoder(run.image_shape)
    try:
        restored = restore_autoencoder(latents.run)
    except UserError as e:
        raise UserError(f"data.data_dir={run.config.data.data_dir!r}: its autoencoder: {e}") from None
    if restored.digest != latents.weights:
        raise UserError(
            f"data.data_dir={run.config.data.data_dir!r}: its autoencoder {latents.run} has changed since; "
            "encode again, into another folder"
        )
    z = jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)
    image = jax.eval_shape(Decoder((0, 0, 0), restored.model), restored.params, z)
    params = jax.device_put(restored.params, NamedSharding(run.mesh, PartitionSpec()))
    _, height, width, channels = image.shape
    return Decoder((height, width, channels), restored.model, params, latents.scale)


def images(run: Run) -> data.Data:
    """Returns the images that a run learns to generate: its own data, or those that its latents encode."""
    latents = run.info.latents
    return run.config.data if latents is None else parse_dataclass(data.Data, latents.data, "data")
