"""Models of a few layers with the signatures of large ones, of which every argument counts.

What is tested with them are objectives; the models have tests of their own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling.models.clip import Embeddings, unit

WIDTH = 8


class Towers(nn.Module):
    """CLIP's: each pixel and each token through a layer, and their means."""

    logit_bias: bool = False

    def setup(self) -> None:
        self.pixels, self.words = nn.Dense(4 * WIDTH), nn.Embed(20, WIDTH)
        self.image, self.text = nn.Dense(6), nn.Dense(6)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(1.0), ())
        if self.logit_bias:
            self.added = self.param("logit_bias", nn.initializers.constant(-3.0), ())

    def image_features(self, x: jax.Array) -> jax.Array:
        return self.image(jnp.tanh(self.pixels(x)).mean(axis=(1, 2)))  # [B, 6]

    def text_features(self, text: jax.Array) -> jax.Array:
        order = 1.0 + jnp.arange(text.shape[1], dtype=jnp.float32)[None, :, None]
        return self.text(jnp.tanh(self.words(text) * order).mean(axis=1))  # [B, 6]

    def __call__(self, x: jax.Array, text: jax.Array, train: bool = False) -> Embeddings:
        image, words = unit(self.image_features(x)), unit(self.text_features(text))
        return Embeddings(image, words, jnp.exp(self.logit_scale), self.added if self.logit_bias else None)


class Reader(nn.Module):
    """ViLT's: sums of patches and of words meet in a layer, which every head sees."""

    tasks: tuple[str, ...] = ("itm", "mlm", "mpp", "retrieval")
    vocabulary: int = 30
    patch: int = 2

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        text: jax.Array,
        mask: jax.Array,
        hidden: jax.Array | None = None,
        train: bool = False,
    ) -> dict[str, jax.Array]:
        b, h, w, c = x.shape
        grid = x.reshape(b, h // self.patch, self.patch, w // self.patch, self.patch, c)
        patches = jnp.swapaxes(grid, 2, 3).reshape(b, -1, self.patch**2 * c)  # [B, M, P * P * C]
        seen = nn.Dense(WIDTH)(patches)
        token = self.param("mask_token", nn.initializers.normal(1.0), (1, 1, WIDTH))
        if hidden is not None:
            seen = jnp.where(hidden[..., None], token, seen)
        words = jnp.where(mask[..., None], nn.Embed(self.vocabulary, WIDTH)(text), 0.0)  # [B, L, D]
        both = jnp.tanh(nn.Dense(WIDTH)(jnp.concatenate([seen.mean(axis=1), words.sum(axis=1)], axis=-1)))
        joint = both[:, None]  # [B, 1, D]
        heads = {
            "itm": lambda: nn.Dense(2)(both),
            "mlm": lambda: nn.Dense(self.vocabulary)(jnp.tanh(words + joint)),
            "mpp": lambda: nn.Dense(c * 256)(jnp.tanh(seen + joint)).reshape(b, -1, c, 256),
            "retrieval": lambda: nn.Dense(1)(both),
        }
        return {task: heads[task]() for task in self.tasks}
