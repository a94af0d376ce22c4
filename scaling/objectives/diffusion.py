"""Diffusion and flow matching as path x prediction x weighting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling import diffusion
from scaling.errors import UserError
from scaling.objectives.base import Batch, Extras, Loss, Params, scaled, summarise
from scaling.randomness import derive_key


@dataclass(frozen=True)
class Diffusion:
    """Denoising of a model `(x [B, H, W, C], t [B] float32, y [B] int32) -> [B, H, W, C or 2C]`.

    DiT's objective (Peebles and Xie 2022, arXiv:2212.09748) is "ddpm-linear" with "eps" and a model with
    `learn_sigma`, whose further C channels are the variance: the mean squared error plus the bound's term.
    SiT's (Ma et al. 2024, arXiv:2401.08740) is "straight" with "v". The null label is row `num_classes`;
    training replaces labels with it here, and nowhere else, with probability `label_dropout`.
    """

    model: nn.Module
    path: Literal["ddpm-linear", "ddpm-cosine", "straight"] = "ddpm-linear"
    prediction: Literal["eps", "x", "v"] = "eps"
    weighting: Literal["uniform", "min-snr"] = "uniform"
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        choices = {
            "path": tuple(diffusion.PATHS),
            "prediction": diffusion.PREDICTIONS,
            "weighting": diffusion.WEIGHTINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if not 0.0 <= self.label_dropout <= 1.0:
            raise UserError(f"label_dropout={self.label_dropout}: must be in [0, 1]")
        if self.learn_sigma and not isinstance(diffusion.PATHS[self.path], diffusion.Chain):
            raise UserError(
                f"learn_sigma=True: path={self.path!r} has no discrete posterior; set learn_sigma=False or "
                "path='ddpm-linear'"
            )

    @property
    def learn_sigma(self) -> bool:
        """Whether the model returns variance channels too."""
        return bool(getattr(self.model, "learn_sigma", False))

    @property
    def null_label(self) -> int:
        """The row of the label table that stands for no label."""
        return int(self.model.num_classes)  # type: ignore[attr-defined]

    def init(self, rng: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """Initialises the model; only the shape of batch["image"] [B, H, W, C] is read."""
        x = jnp.zeros((1, *batch["image"].shape[1:]))
        return self.model.init(rng, x, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))

    def predict(
        self, params: Params, x_t: jax.Array, time: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the prediction, and the raw variance if it is learned, each [B, H, W, C] float32."""
        out = jnp.asarray(self.model.apply({"params": params}, x_t, time, labels)).astype(jnp.float32)
        if not self.learn_sigma:
            return out, None
        prediction, raw = jnp.split(out, 2, axis=-1)
        return prediction, raw

    def loss(self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        """Returns the loss, a mean over the pixels and then over the examples.

        Metrics: loss, mse (unweighted), and vb (the bound's term in bits per dimension) if the variance is
        learned.
        """
        path = diffusion.PATHS[self.path]
        if self.prediction != "v":
            path = path.trimmed()
        x = scaled(batch["image"])  # [B, H, W, C]
        position = path.draw(derive_key(rng, "time"), x.shape[0])  # [B]
        broadcast_position = position[:, None, None, None]  # [B, 1, 1, 1]
        point = path.point(broadcast_position)
        eps = jax.random.normal(derive_key(rng, "noise"), x.shape)  # [B, H, W, C]
        x_t = diffusion.noised(x, eps, point)  # [B, H, W, C]
        labels = self._labels(extras, batch, rng) if train else batch["label"]  # [B]
        output, raw = self.predict(params, x_t, path.time(position), labels)  # [B, H, W, C]
        target = diffusion.target(self.prediction, x, eps, point)  # [B, H, W, C]
        mse = ((output - target) ** 2).mean(axis=(1, 2, 3))  # [B]
        loss = diffusion.weight(self.weighting, self.prediction, point).reshape(-1) * mse  # [B]
        if raw is None:
            return summarise({"loss": loss, "mse": mse}, batch, extras.collections)
        assert isinstance(path, diffusion.Chain)  # ensured by __post_init__
        x_hat, _ = diffusion.estimates(self.prediction, output, x_t, point)
        vb = diffusion.vlb(path, broadcast_position, x, x_t, x_hat, raw)  # [B]
        return summarise({"loss": loss + vb, "mse": mse, "vb": vb}, batch, extras.collections)

    def _labels(self, extras: Extras, batch: Batch, rng: jax.Array) -> jax.Array:
        """Returns labels [B], some of them the null label; a rate in `traced_hparams` takes precedence."""
        rate = extras.traced_hparams.get("label_dropout", jnp.float32(self.label_dropout))
        labels = batch["label"]
        dropped = jax.random.uniform(derive_key(rng, "label_dropout"), labels.shape) < rate
        return jnp.where(dropped, self.null_label, labels)
