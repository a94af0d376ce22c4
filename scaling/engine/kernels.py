"""Attention as one kernel, which never writes q k^T to memory: cuDNN's on GPUs, splash attention on TPUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling.models import placement
from scaling.models.attention import SAVED, scaled

# Where a TPU's kernel pays, by its compiler: of DiT-XL/2 on v5e plain products take 120 of 281 ms at 1,024
# tokens, and what they multiply 11 ms at peak rate; at 576 and 256 what is saved goes into changes of layout.
LONG = 1024  # tokens
WIDE = 128  # of a head, above which blocks of this size may not fit a TPU's own memory


def attention(device: Any) -> Callable[..., jax.Array] | None:
    """What `models.attention.FUSED` is on a device: NVIDIA's have cuDNN's from Ampere on, TPUs splash."""
    if device.platform == "tpu":
        return splash
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return cudnn if device.platform == "gpu" and major.isdecimal() and int(major) >= 8 else None


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None) -> jax.Array:
    """By cuDNN. An odd number of tokens gets one more, which is masked: jax has no gradient for odd ones.

    Raises: NotImplementedError for float32, for widths of heads that cuDNN has not, and without cuDNN.
    """
    lengths: dict[str, Any] = {}
    if q.shape[1] % 2 or k.shape[1] % 2:
        lengths = {
            "query_seq_lengths": jnp.full(len(q), q.shape[1], jnp.int32),
            "key_value_seq_lengths": jnp.full(len(k), k.shape[1], jnp.int32),
        }
    q, k, v, tokens = (*(_padded(each, 2) for each in (q, k, v)), q.shape[1])
    try:
        out = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **lengths)
    except RuntimeError as e:  # no cuDNN
        raise NotImplementedError(str(e)) from None
    return out[:, :tokens]


def splash(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None) -> jax.Array:
    """By jax's splash attention, on each chip's share of the batch and of the heads.

    Raises: NotImplementedError for few tokens and for wide heads.
    """
    if min(q.shape[1], k.shape[1]) < LONG or q.shape[-1] > WIDE:
        raise NotImplementedError(f"{q.shape}: fewer than {LONG} tokens, or heads wider than {WIDE}")
    cut = placement.spec(q.shape, "batch", None, "heads", None)
    share = jax.shard_map(_splash, in_specs=(cut, cut, cut), out_specs=cut, check_vma=False)
    return share(scaled(q, scale), k, v)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T) v on one chip, tokens padded to whole blocks, of which keys are masked."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # half a second, of TPUs alone

    (_, tokens, heads, _), keys = q.shape, k.shape[1]
    rows, columns = block_of(tokens), block_of(keys)
    q = _padded(q, rows).transpose(0, 2, 1, 3)  # [B, h, N', d]
    k, v = (_padded(x, columns).transpose(0, 2, 1, 3) for x in (k, v))  # [B, h, M', d]
    backward: Any = dict(block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows, block_kv_dq=columns)
    attend = kernels.make_splash_mha(
        mask=kernels.MultiHeadMask([kernels.FullMask((q.shape[2], k.shape[2]))] * heads),
        block_sizes=kernels.BlockSizes(block_q=rows, block_kv=columns, **backward),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
    )
    real = None
    if k.shape[2] > keys:  # tokens of one segment see each other
        segments = (jnp.arange(k.shape[2]) >= keys).astype(jnp.int32)
        real = kernels.SegmentIds(jnp.zeros(q.shape[2], jnp.int32), segments)
    out = jax.vmap(attend, in_axes=(0, 0, 0, None))(q, k, v, real)  # [B, h, N', d]
    return out.transpose(0, 2, 1, 3)[:, :tokens]


def block_of(tokens: int) -> int:
    """The side of a block, of 256 to 1,024 tokens: what pads least, and of those the largest."""
    return min(range(256, 1025, 128), key=lambda block: (-tokens % block, -block))


def _padded(x: jax.Array, block: int) -> jax.Array:
    """x [B, N, h, d] with tokens of zeros at the end, to a multiple of `block`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
