"""CLIP's text transformer (Radford et al. 2021, section 2.4).

text [B, N] are token ids; D is the width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import UserError
from scaling.models.attention import bias_of
from scaling.models.layers import Embed, EncoderBlock, Kernels, Remat, layer_norm, stack
from scaling.models.placement import constrain
from scaling.models.roles import EMBED, NORM, POSITIONS, Blocks, Part

normal = nn.initializers.normal


def kernels(width: int, depth: int) -> Kernels:
    """Returns initialisers for the kernels of CLIP's transformers, as in GPT-2 (Radford et al. 2019).

    Kernels whose output is added to the residual stream are scaled by 1 / sqrt(2 depth), where `depth` is the
    number of blocks.
    """
    inputs, residual = normal(width**-0.5), normal((2 * width * depth) ** -0.5)
    return Kernels(inputs, inputs, residual, up=normal((2 * width) ** -0.5), down=residual)


def run_blocks(tower: Any, x: jax.Array, *bias: jax.Array) -> jax.Array:
    """Applies the blocks that the fields of a tower of CLIP's, text or image, describe to x [B, N, D]."""
    block = EncoderBlock(
        tower.heads,
        tower.mlp_ratio,
        tower.activation,
        epsilon=tower.epsilon,
        kernels=kernels(tower.width, tower.depth),
        dtype=tower.dtype,
        name="blocks",
    )
    return stack(block, tower.depth, x, *bias, remat=tower.remat, unroll=tower.unroll)


class TextTransformer(nn.Module):
    """CLIP's causal text transformer: text [B, N] int32 -> [B, N, width] float32, after the last norm.

    Token embeddings are initialised N(0, 0.02), positions N(0, 0.01). Texts may be shorter than `context`.

    Raises:
        UserError: if a text is longer than `context`, or `heads` does not divide the width.
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

    ROLES = Part(
        {"tokens": EMBED, "positions": POSITIONS, "blocks": EncoderBlock.ROLES.at(Blocks()), "norm": NORM}
    )

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        length = text.shape[1]
        if length > self.context:
            raise UserError(f"context={self.context}: the texts have {length} tokens; cut them, or raise it")
        embed = Embed(
            self.vocabulary, self.width, embedding_init=normal(0.02), dtype=self.dtype, name="tokens"
        )
        positions = self.param("positions", normal(0.01), (self.context, self.width))
        x = embed(text) + positions[:length].astype(self.dtype)[None]  # [B, N, D]
        x = constrain(x, "batch", "token", "embed")
        causal = bias_of(jnp.asarray(np.tri(length, dtype=bool)))[None, None]  # [1, 1, N, N]
        x = run_blocks(self, x, causal)  # [B, N, D]
        return layer_norm(x.astype(jnp.float32), "norm", epsilon=self.epsilon)


def end_of_text(x: jax.Array, text: jax.Array) -> jax.Array:
    """Returns x [B, N, D] at each text's end-of-text token, the first of its greatest ids: [B, D]."""
    last = jnp.argmax(text, axis=1)  # [B], the first of equal ids
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
