"""Scaled dot-product attention: plain products or, where the engine says so, a GPU's fused kernel."""

from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

# Whether attention may be cuDNN's kernel, which never writes q k^T to memory. Set by who compiles for a GPU;
# models alone leave it off, as a kernel has no forward-mode derivative and cannot be counted.
CUDNN: ContextVar[bool] = ContextVar("CUDNN", default=False)


def bias_of(mask: jax.Array) -> jax.Array:
    """What to add to the logits of attention: 0 where `mask` is true, and otherwise float32's least."""
    return jnp.where(mask, jnp.float32(0), jnp.finfo(jnp.float32).min)


def dot_product_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """softmax(scale q k^T + bias) v (Vaswani et al. 2017, equation 1), in each of h heads of width d.

    q [B, N, h, d], k and v [B, M, h, d], bias float32 [B or 1, h or 1, N or 1, M] -> [B, N, h, d]. The scale
    is 1 / sqrt(d) unless given. Plain products and a float32 softmax, so that it can be differentiated in
    both modes, and counted; but a fused kernel where `CUDNN` allows one, there is no bias, and cuDNN has it.
    """
    if CUDNN.get() and bias is None:
        try:
            return _fused(q, k, v, scale)
        except (NotImplementedError, RuntimeError):  # float32, a width of head it has not; no cuDNN
            pass
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)  # [B, h, N, M]
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)  # [B, N, h, d]


def _fused(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None) -> jax.Array:
    """By cuDNN. An odd number of tokens gets one more, which is masked: jax has no gradient for odd ones."""
    lengths: dict[str, Any] = {}
    if q.shape[1] % 2 or k.shape[1] % 2:
        lengths = {
            "query_seq_lengths": jnp.full(len(q), q.shape[1], jnp.int32),
            "key_value_seq_lengths": jnp.full(len(k), k.shape[1], jnp.int32),
        }
    out = jax.nn.dot_product_attention(
        _even(q), _even(k), _even(v), scale=scale, implementation="cudnn", **lengths
    )
    return out[:, : q.shape[1]]


def _even(x: jax.Array) -> jax.Array:
    """x [B, N, h, d] with a token of zeros at the end if N is odd."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def keeps_products(primitive: Any, *args: Any, **options: Any) -> bool:
    """A remat policy: what linear layers and fused attention gave is kept, but not q k^T."""
    fused: bool = primitive.name.startswith("dot_product_attention_fwd")
    return fused or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **options)
