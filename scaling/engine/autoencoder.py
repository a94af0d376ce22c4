"""A trained autoencoder as a tool: what encodes images, and what makes images of generated latents."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from scaling import data
from scaling.engine import features
from scaling.engine.build import Built
from scaling.errors import UserError
from scaling.typed import typed


@dataclass(frozen=True)
class Autoencoder:
    """The model of a run and the weights that it is evaluated with."""

    model: Any
    params: Any  # on this host, float32
    digest: str  # of the weights: latents and decoder must be of the same


def restore(folder: Path | str) -> Autoencoder:
    """The autoencoder of a run folder. Raises UserError where it has none."""
    trained = features.restore(folder)
    built = trained.built
    if not hasattr(built.model, "moments"):
        family = built.config.model.name
        raise UserError(
            f"run={folder}: is a run of {family}, which has no latent; give one of the family vae"
        )
    params = features.on_host(trained.weights["params"])
    return Autoencoder(built.model, params, features.weights_digest(params))


@dataclass(frozen=True, eq=False)
class Decoder:
    """What a run generates, as images [B, H, W, C] in [-1, 1]: pixels as they are, latents decoded.

    Latents are divided by their scale first. The weights are an argument, so that compiled code does not
    hold them.
    """

    shape: tuple[int, ...]  # [H, W, C] of the images
    model: Any = None
    params: Any = None
    scale: float = 1.0

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        if self.model is None:
            return x
        return jnp.asarray(self.model.apply({"params": params}, x / self.scale, method="decode"))


@lru_cache(maxsize=2)
def decoder(built: Built) -> Decoder:
    """The decoder of a run's samples, its weights on all of the run's devices.

    Raises: UserError where the autoencoder is not there, or no longer the one that encoded.
    """
    latents = built.info.latents
    if latents is None:
        return Decoder(built.image_shape)
    try:
        vae = restore(latents.run)
    except UserError as e:
        raise UserError(f"data.data_dir={built.config.data.data_dir!r}: its autoencoder: {e}") from None
    if vae.digest != latents.weights:
        raise UserError(
            f"data.data_dir={built.config.data.data_dir!r}: its autoencoder {latents.run} has changed since; "
            "encode again, into another folder"
        )
    z = jax.ShapeDtypeStruct((1, *built.image_shape), jnp.float32)
    image = jax.eval_shape(Decoder((0, 0, 0), vae.model), vae.params, z)
    params = jax.device_put(vae.params, NamedSharding(built.mesh, PartitionSpec()))
    _, height, width, channels = image.shape
    return Decoder((height, width, channels), vae.model, params, latents.scale)


def images(built: Built) -> data.Data:
    """The images that a run generates: its own data, or what its latents encode."""
    latents = built.info.latents
    return built.config.data if latents is None else typed(data.Data, latents.data, "data")
