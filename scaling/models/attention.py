"""Scaled dot-product attention: plain products or, where the engine has one, a fused kernel."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

# Attention as one kernel, which never writes q k^T to memory: `f(q, k, v, scale)`, which raises
# NotImplementedError for what it is not made for. Set by who compiles for a machine that has one; models
# alone leave it off, as a kernel has no forward-mode derivative and cannot be counted.
FUSED: ContextVar[Callable[..., jax.Array] | None] = ContextVar("FUSED", default=None)
SAVED = "attention"  # the name that a kernel gives to what its backward pass reads, for `keeps_products`


def bias_of(mask: jax.Array) -> jax.Array:
    """What to add to the logits of attention: 0 where `mask` is true, and otherwise float32's least."""
    return jnp.where(mask, jnp.float32(0), jnp.finfo(jnp.float32).min)


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """softmax(scale q k^T + bias) v (Vaswani et al. 2017, equation 1), in each of h heads of width d.

    q [B, N, h, d], k and v [B, M, h, d], bias float32 [B or 1, h or 1, N or 1, M] -> [B, N, h, d]. The scale
    is 1 / sqrt(d) unless given. Plain products and a float32 softmax, so that it can be differentiated in
    both modes, and counted; but the kernel `FUSED` where there is one for these shapes, and no bias.
    """
    fused = FUSED.get()
    if fused is not None and bias is None:
        try:
            return fused(q, k, v, scale)
        except NotImplementedError:
            pass
    q = scaled(q, scale)
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)  # [B, h, N, M]
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)  # [B, N, h, d]


def scaled(q: jax.Array, scale: float | None) -> jax.Array:
    """q [..., d] times the scale, 1 / sqrt(d) unless given."""
    return q * (q.shape[-1] ** -0.5 if scale is None else scale)


def keeps_products(primitive: Any, *args: Any, **options: Any) -> bool:
    """A remat policy: what linear layers and fused attention gave is kept, but not q k^T."""
    cudnn: bool = primitive.name.startswith("dot_product_attention_fwd")
    named: bool = primitive.name == "name" and options["name"] == SAVED
    return (
        cudnn
        or named
        or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **options)
    )
