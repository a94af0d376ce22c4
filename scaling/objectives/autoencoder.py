"""Variational autoencoding: reconstruction and a KL penalty."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.errors import UserError
from scaling.models.base import HasMoments
from scaling.models.vae import sample
from scaling.objectives.base import NO_HELPERS, Batch, Extras, Helpers, Loss, Params, scaled, summarise
from scaling.randomness import derive_key

RECONSTRUCTIONS = ("l1", "mse")


@dataclass(frozen=True)
class Autoencoder:
    """The evidence bound (Kingma & Welling 2014, eq. 3) of a model with `moments` and `decode`.

    `reconstruction` is the absolute or the squared error of one draw from the posterior, as the mean over all
    pixels and channels; `kl_weight` multiplies the KL divergence to N(0, 1), divided by the same number. So
    the weight means the same as in latent diffusion (Rombach et al. 2022, appendix G), which sums both terms
    and takes 1e-6 with the absolute error; its perceptual and adversarial terms are not implemented.
    """

    model: nn.Module
    reconstruction: Literal["l1", "mse"] = "l1"
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        if self.reconstruction not in RECONSTRUCTIONS:
            allowed = ", ".join(RECONSTRUCTIONS)
            raise UserError(f"reconstruction={self.reconstruction!r}: must be one of {allowed}")
        if not self.kl_weight >= 0.0:
            raise UserError(f"kl_weight={self.kl_weight}: must be at least 0")
        if not isinstance(self.model, HasMoments):
            name = type(self.model).__name__
            raise UserError(f"model={name}: has no latent; the objective autoencoder is for the family vae")

    def init(self, rng: jax.Array, batch: Batch, helpers: Helpers = NO_HELPERS) -> Mapping[str, Any]:
        """Initialises the model; only the shape of batch["image"] [B, H, W, C] is read."""
        return self.model.init(rng, jnp.zeros((1, *batch["image"].shape[1:])))

    def loss(self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        """Returns the loss with the metrics loss, reconstruction, kl (nats per example) and psnr (dB).

        The KL divergence is that of the whole latent. Training and evaluation both draw from the posterior.
        """
        x = scaled(batch["image"])  # [B, H, W, C]
        moments: Any = self.model.apply({"params": params}, x, method="moments")
        mean, logvar = moments  # [B, h, w, Z] each
        z = sample(mean, logvar, derive_key(rng, "posterior"))  # [B, h, w, Z]
        out = jnp.asarray(self.model.apply({"params": params}, z, method="decode"))  # [B, H, W, C]
        error = jnp.abs(out - x) if self.reconstruction == "l1" else (out - x) ** 2
        reconstruction = error.mean(axis=(1, 2, 3))  # [B]
        kl = divergence(mean, logvar)  # [B]
        values = {
            "loss": reconstruction + self.kl_weight / x[0].size * kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "psnr": psnr(out, x),
        }
        return summarise(values, batch, extras.collections)


def divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Returns KL(N(mean, exp(logvar)) || N(0, 1)) in nats [B], of [B, h, w, Z] (Kingma & Welling, app. B)."""
    return 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).sum(axis=(1, 2, 3))


def psnr(output: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the peak signal-to-noise ratio of images [B, H, W, C] in [-1, 1]: dB [B], at most 100.

    Values outside of the range are clipped to it, as they would be in a picture.
    """
    mse = ((jnp.clip(output, -1.0, 1.0) - target) ** 2).mean(axis=(1, 2, 3))  # [B]
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 4e-10))
