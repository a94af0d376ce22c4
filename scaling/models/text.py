"""CLIP's text transformer (Radford et al. 2021, section 2.4), and the layers that it shares with T5.

text [B, N] are token ids; D is the width. Here kernels start normal with a deviation for each, which `layers`
starts Xavier-uniform; biases start at 0.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import UserError
from scaling.models.layers import (
    ACTIVATIONS,
    Remat,
    bias_of,
    constrain,
    dot_product_attention,
    layer_norm,
    stack,
)

normal = nn.initializers.normal


class Attention(nn.Module):
    """Multi-head attention of x [B, N, D] to itself, or to a context [B, M, D]. Returns [B, N, features].

    `std` are the deviations with which the kernels of the query, of key and value, and of the output start.
    `features` are D and `head_width` D / heads unless given; `scale` and `bias` are those of
    `layers.dot_product_attention`.

    Raises: UserError where `heads` does not divide D and no `head_width` is given.
    """

    heads: int
    std: tuple[float, float, float]
    features: int | None = None
    head_width: int | None = None
    scale: float | None = None
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, bias: jax.Array | None = None
    ) -> jax.Array:
        width, source = x.shape[-1], x if context is None else context
        if self.head_width is None and width % self.heads:
            raise UserError(f"heads={self.heads}: must divide the width, which is {width}")
        project = functools.partial(
            nn.DenseGeneral,
            (self.heads, self.head_width or width // self.heads),
            use_bias=self.use_bias,
            dtype=self.dtype,
        )
        first, second, last = (normal(std) for std in self.std)
        q = project(kernel_init=first, name="query")(x)  # [B, N, heads, d]
        k = project(kernel_init=second, name="key")(source)  # [B, M, heads, d]
        v = project(kernel_init=second, name="value")(source)  # [B, M, heads, d]
        q, k, v = (constrain(each, "batch", "token", "heads", None) for each in (q, k, v))
        x = dot_product_attention(q, k, v, bias, self.scale)  # [B, N, heads, d]
        out = nn.DenseGeneral(
            self.features or width,
            axis=(-2, -1),
            use_bias=self.use_bias,
            kernel_init=last,
            dtype=self.dtype,
            name="out",
        )
        return out(x)  # [B, N, features]


class Mlp(nn.Module):
    """[B, N, D] -> [B, N, hidden] -> [B, N, D], with an activation between.

    `gated`: a second linear layer, with the activation, multiplies the first, which is without (Shazeer 2020,
    equation 6). `std` are the deviations with which the kernels in and out start.
    """

    hidden: int
    activation: str
    std: tuple[float, float]
    gated: bool = False
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype)
        activation, start, width = ACTIVATIONS[self.activation], normal(self.std[0]), x.shape[-1]
        h = dense(self.hidden, kernel_init=start, name="up")(x)  # [B, N, hidden]
        if self.gated:
            h = h * activation(dense(self.hidden, kernel_init=start, name="gate")(x))
        else:
            h = activation(h)
        h = constrain(h, "batch", "token", "mlp")
        return dense(width, kernel_init=normal(self.std[1]), name="down")(h)  # [B, N, D]


class Block(nn.Module):
    """A pre-norm block of CLIP's transformers: [B, N, D] -> [B, N, D].

    Starts as GPT-2's do (Radford et al. 2019): what is added to the residuals is scaled by 1 / sqrt(2 depth),
    `depth` being the number of blocks.
    """

    heads: int
    depth: int
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        std, residual = width**-0.5, (2 * width * self.depth) ** -0.5
        attention = Attention(self.heads, (std, std, residual), dtype=self.dtype, name="attention")
        mlp = Mlp(
            round(width * self.mlp_ratio),
            self.activation,
            ((2 * width) ** -0.5, residual),
            dtype=self.dtype,
            name="mlp",
        )
        x = x + attention(layer_norm(x, "norm_attention", epsilon=self.epsilon), bias=bias)  # [B, N, D]
        x = x + mlp(layer_norm(x, "norm_mlp", epsilon=self.epsilon))
        return constrain(x, "batch", "token", "embed")


class TextTransformer(nn.Module):
    """CLIP's causal text transformer: text [B, N] int32 -> [B, N, width] float32, after the last norm.

    Token embeddings start N(0, 0.02), positions N(0, 0.01). A text may be shorter than `context`.

    Raises: UserError where a text is longer than `context`, or `heads` does not divide the width.
    """

    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    vocabulary: int = 49408
    context: int = 77
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    remat: Remat = "none"
    unroll: bool = False

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        length = text.shape[1]
        if length > self.context:
            raise UserError(f"context={self.context}: the texts have {length} tokens; cut them, or raise it")
        embed = nn.Embed(
            self.vocabulary, self.width, embedding_init=normal(0.02), dtype=self.dtype, name="tokens"
        )
        positions = self.param("positions", normal(0.01), (self.context, self.width))
        x = embed(text) + positions[:length].astype(self.dtype)[None]  # [B, N, D]
        x = constrain(x, "batch", "token", "embed")
        causal = bias_of(jnp.asarray(np.tri(length, dtype=bool)))[None, None]  # [1, 1, N, N]
        block = Block(
            self.heads,
            self.depth,
            self.mlp_ratio,
            self.activation,
            self.epsilon,
            self.dtype,
            name="blocks",
        )
        x = stack(block, self.depth, x, causal, remat=self.remat, unroll=self.unroll)  # [B, N, D]
        return layer_norm(x.astype(jnp.float32), "norm", epsilon=self.epsilon)


def end_of_text(x: jax.Array, text: jax.Array) -> jax.Array:
    """Of x [B, N, D], the vector [B, D] at the first of each text's greatest ids, its end-of-text token."""
    last = jnp.argmax(text, axis=1)  # [B], the first of equal ones
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
