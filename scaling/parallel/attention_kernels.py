"""Attention as one kernel, which never writes q k^T to memory: cuDNN's on GPUs, splash attention on TPUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling.models import placement
from scaling.models.attention import SAVED, scaled

# A TPU's kernel pays from so many tokens, by its compiler's estimate: in DiT-XL/2 on v5e at 1,024 tokens,
# plain attention takes 120 of 281 ms, and its matmuls take 11 ms at peak rate; at 576 and 256 tokens, changes
# of layout cost what the kernel saves.
LONG = 1024  # minimum number of tokens
WIDE = 128  # maximum width of a head; for wider ones the blocks may not fit a TPU's own memory


def attention(device: Any) -> Callable[..., jax.Array] | None:
    """Returns a device's attention kernel, if any: splash on TPUs, cuDNN's on NVIDIA GPUs from Ampere on."""
    if device.platform == "tpu":
        return splash
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return cudnn if device.platform == "gpu" and major.isdecimal() and int(major) >= 8 else None


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None) -> jax.Array:
    """Returns attention by cuDNN; q, k, v and the result are as in `models.attention.dot_product_attention`.

    An odd number of tokens gets one more, which is masked, as jax has no gradient for odd numbers.

    Raises:
        NotImplementedError: if q is float32, cuDNN does not have this width of heads, or there is no cuDNN.
    """
    lengths: dict[str, Any] = {}
    if q.shape[1] % 2 or k.shape[1] % 2:
        lengths = {
            "query_seq_lengths": jnp.full(len(q), q.shape[1], jnp.int32),
            "key_value_seq_lengths": jnp.full(len(k), k.shape[1], jnp.int32),
        }
    q, k, v, tokens = (*(_pad_tokens(each, 2) for each in (q, k, v)), q.shape[1])
    try:
        out = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **lengths)
    except RuntimeError as e:  # no cuDNN
        raise NotImplementedError(str(e)) from None
    return out[:, :tokens]


def splash(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None) -> jax.Array:
    """Returns attention by jax's splash kernel, on each chip's share of the batch and of the heads.

    Raises:
        NotImplementedError: if there are fewer than `LONG` tokens, or heads are wider than `WIDE`.
    """
    if min(q.shape[1], k.shape[1]) < LONG or q.shape[-1] > WIDE:
        raise NotImplementedError(f"{q.shape}: fewer than {LONG} tokens, or heads wider than {WIDE}")
    sharded = placement.spec(q.shape, "batch", None, "heads", None)
    specs = (sharded, sharded, sharded)
    attend = jax.shard_map(_splash_on_chip, in_specs=specs, out_specs=sharded, check_vma=False)
    return attend(scaled(q, scale), k, v)


def _splash_on_chip(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns softmax(q k^T) v on one chip. Tokens are padded to full blocks, and padded keys are masked."""
    # The import takes half a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    (_, tokens, heads, _), keys = q.shape, k.shape[1]
    rows, columns = block_of(tokens), block_of(keys)
    q = _pad_tokens(q, rows).transpose(0, 2, 1, 3)  # [B, h, N', d]
    k, v = (_pad_tokens(x, columns).transpose(0, 2, 1, 3) for x in (k, v))  # [B, h, M', d]
    backward: Any = dict(block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns)
    attend = kernels.make_splash_mha(
        mask=kernels.MultiHeadMask([kernels.FullMask((q.shape[2], k.shape[2]))] * heads),
        block_sizes=kernels.BlockSizes(block_q=rows, block_kv=columns, **backward),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
    )
    segments = None
    if k.shape[2] > keys:  # queries see the keys of their own segment only: padded keys are in another
        key_segments = (jnp.arange(k.shape[2]) >= keys).astype(jnp.int32)
        segments = kernels.SegmentIds(jnp.zeros(q.shape[2], jnp.int32), key_segments)
    out = jax.vmap(attend, in_axes=(0, 0, 0, None))(q, k, v, segments)  # [B, h, N', d]
    return out.transpose(0, 2, 1, 3)[:, :tokens]


def block_of(tokens: int) -> int:
    """Returns the side of a block, 256 to 1,024 tokens: the largest of those with the least padding."""
    return min(range(256, 1025, 128), key=lambda block: (-tokens % block, -block))


def _pad_tokens(x: jax.Array, block: int) -> jax.Array:
    """Returns x [B, N, h, d] with tokens of zeros at the end, up to a multiple of `block`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
