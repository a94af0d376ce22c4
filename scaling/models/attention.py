"""Scaled dot-product attention: plain matmuls or, on a device that has one, a fused kernel."""

from typing import Any

import jax
import jax.numpy as jnp

from scaling.models.execution import EXECUTION

SAVED = "attention"  # name that a kernel gives to what its backward pass reads, for `keeps_products`


def bias_of(mask: jax.Array) -> jax.Array:
    """Returns a mask as a bias of attention's logits: 0 where it is true, float32's minimum elsewhere."""
    return jnp.where(mask, jnp.float32(0), jnp.finfo(jnp.float32).min)


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """Computes softmax(scale q k^T + bias) v (Vaswani et al. 2017, equation 1) in h heads of width d.

    q [B, N, h, d], k and v [B, M, h, d], bias float32 [B or 1, h or 1, N or 1, M] -> [B, N, h, d]. The scale
    is 1 / sqrt(d) unless given. Without a bias, the kernel `Execution.attention` is used if it is set and
    supports these shapes. Otherwise attention is two plain matmuls and a float32 softmax, which can be
    differentiated in both modes, and counted.
    """
    fused = EXECUTION.get().attention
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
    """Multiplies q [..., d] by the scale, 1 / sqrt(d) unless given."""
    return q * (q.shape[-1] ** -0.5 if scale is None else scale)


def keeps_products(primitive: Any, *args: Any, **options: Any) -> bool:
    """Returns whether remat keeps an output: those of linear layers and fused attention, but not q k^T."""
    from_cudnn: bool = primitive.name.startswith("dot_product_attention_fwd")
    saved_by_name: bool = primitive.name == "name" and options["name"] == SAVED
    return (
        from_cudnn
        or saved_by_name
        or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **options)
    )
