"""Diffusion and flow matching as path x prediction x weighting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling import diffusion
from scaling.errors import UserError
from scaling.models.conditioning import Condition, Conditioning, conditioning_of, dropped
from scaling.objectives.base import (
    NO_HELPERS,
    Batch,
    Extras,
    Helpers,
    Loss,
    Params,
    scaled,
    summarise,
)
from scaling.randomness import derive_key


@dataclass(frozen=True)
class Diffusion:
    """Denoising of a model `(x [B, ..., C], t [B] float32, condition) -> [B, ..., C or 2C]`.

    Examples x are images [B, H, W, C] or clips [B, T, H, W, C], in pixels or latents. A condition is what the
    model's `conditioning` makes of a batch, for DiT a label [B] int32.

    DiT's objective (Peebles and Xie 2022, arXiv:2212.09748) is "ddpm-linear" with "eps" and a model with
    `learn_sigma`, whose further C channels are the variance: the mean squared error plus the bound's term.
    SiT's (Ma et al. 2024, arXiv:2401.08740) is "straight" with "v". Training replaces conditions with the
    null one here, and nowhere else, with probability `condition_dropout`.
    """

    model: nn.Module
    path: Literal["ddpm-linear", "ddpm-cosine", "straight"] = "ddpm-linear"
    prediction: Literal["eps", "x", "v"] = "eps"
    weighting: Literal["uniform", "min-snr"] = "uniform"
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        choices = {
            "path": tuple(diffusion.PATHS),
            "prediction": diffusion.PREDICTIONS,
            "weighting": diffusion.WEIGHTINGS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if not 0.0 <= self.condition_dropout <= 1.0:
            raise UserError(f"condition_dropout={self.condition_dropout}: must be in [0, 1]")
        if self.learn_sigma and not isinstance(diffusion.PATHS[self.path], diffusion.Chain):
            raise UserError(
                f"model.learn_sigma=True: objective.path={self.path!r} has no discrete posterior; set "
                "model.learn_sigma=False or objective.path='ddpm-linear'"
            )

    @property
    def learn_sigma(self) -> bool:
        """Whether the model returns variance channels too."""
        return bool(getattr(self.model, "learn_sigma", False))

    @property
    def conditioning(self) -> Conditioning:
        """How the model's conditions are made."""
        return conditioning_of(self.model)

    def init(self, rng: jax.Array, batch: Batch, helpers: Helpers = NO_HELPERS) -> Mapping[str, Any]:
        """Initialises the model; only the shapes of arrays are read."""
        x = jnp.zeros((1, *batch["image"].shape[1:]))
        shapes = jax.eval_shape(self.conditioning.of, batch, dict(helpers))
        one = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), shapes)
        return self.model.init(rng, x, jnp.zeros((1,)), one)

    def predict(
        self, params: Params, x_t: jax.Array, time: jax.Array, condition: Condition
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the prediction, and the raw variance if it is learned, each [B, ..., C] float32."""
        out = jnp.asarray(self.model.apply({"params": params}, x_t, time, condition)).astype(jnp.float32)
        if not self.learn_sigma:
            return out, None
        prediction, raw = jnp.split(out, 2, axis=-1)
        return prediction, raw

    def loss(self, params: Params, extras: Extras, batch: Batch, rng: jax.Array, train: bool) -> Loss:
        """Returns the loss, a mean over an example's pixels and then over the examples.

        Metrics: loss, mse (unweighted), and vb (the bound's term in bits per dimension) if the variance is
        learned.
        """
        x = scaled(batch["image"])  # [B, ..., C]
        position = self.trained_path.draw(derive_key(rng, "time"), x.shape[0])  # [B]
        eps = jax.random.normal(derive_key(rng, "noise"), x.shape)  # [B, ..., C]
        condition = self.conditioning.of(batch, extras.helpers)
        condition = self._some_dropped(condition, extras, x.shape[0], rng) if train else condition
        return summarise(self.errors(params, x, position, eps, condition), batch, extras.collections)

    @property
    def trained_path(self) -> diffusion.Path:
        """The path between the positions that are trained on."""
        path = diffusion.PATHS[self.path]
        return path if self.prediction == "v" else path.trimmed()

    def errors(
        self, params: Params, x: jax.Array, position: jax.Array, eps: jax.Array, condition: Condition
    ) -> dict[str, jax.Array]:
        """Returns the metrics of `loss`, each [B], at positions [B] with noise eps [B, ..., C]."""
        path = self.trained_path
        broadcast_position = position.reshape(-1, *(1,) * (x.ndim - 1))  # [B, 1, ..., 1]
        point = path.point(broadcast_position)
        x_t = diffusion.noised(x, eps, point)  # [B, ..., C]
        output, raw = self.predict(params, x_t, path.time(position), condition)  # [B, ..., C]
        target = diffusion.target(self.prediction, x, eps, point)  # [B, ..., C]
        mse = ((output - target) ** 2).mean(axis=tuple(range(1, x.ndim)))  # [B]
        loss = diffusion.weight(self.weighting, self.prediction, point).reshape(-1) * mse  # [B]
        if raw is None:
            return {"loss": loss, "mse": mse}
        assert isinstance(path, diffusion.Chain)  # ensured by __post_init__
        x_hat, _ = diffusion.estimates(self.prediction, output, x_t, point)
        vb = diffusion.vlb(path, broadcast_position, x, x_t, x_hat, raw)  # [B]
        return {"loss": loss + vb, "mse": mse, "vb": vb}

    def _some_dropped(self, condition: Condition, extras: Extras, count: int, rng: jax.Array) -> Condition:
        """Returns conditions, some of them the null one; a rate in `traced_hparams` takes precedence."""
        rate = extras.traced_hparams.get("condition_dropout", jnp.float32(self.condition_dropout))
        drop = jax.random.uniform(derive_key(rng, "label_dropout"), (count,)) < rate
        return dropped(condition, self.conditioning.null(condition), drop)
