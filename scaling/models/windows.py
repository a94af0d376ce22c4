"""Windows of Swin transformers (Liu et al. 2021): padding, shifts, relative positions, attention within them.

x is a feature map [B, h, w, D]; M is the side of a window, N = M * M its tokens, n the number of windows.
"""

import jax
import jax.numpy as jnp
import numpy as np

from scaling.models.attention import dot_product_attention


def pad(x: jax.Array, multiple: int) -> jax.Array:
    """Pads x [B, h, w, D] with zeros below and on the right, so that `multiple` divides both sides."""
    below, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Returns the attention bias in the windows of a shifted map [h, w]: [n, N, N] float32, 0 or -100.

    The cyclic shift brings tokens of opposite borders into one window; they do not attend to each other
    (figure 4).
    """
    rows, columns = -(-height // window), -(-width // window)  # numbers of windows in the padded map
    row, column = (  # [h'] and [w']
        np.repeat([0, 1, 2], [(count - 1) * window, window - shift, shift]) for count in (rows, columns)
    )
    region = 3 * row[:, None] + column[None, :]  # [h', w'], nine regions
    region = region.reshape(rows, window, columns, window)
    region = region.transpose(0, 2, 1, 3).reshape(-1, window * window)  # [n, N]
    return np.where(region[:, :, None] == region[:, None, :], 0, -100).astype(np.float32)


def relative_index(window: int, table_window: int) -> np.ndarray:
    """Returns each token pair's row in a bias table that is made for windows of `table_window`: [N, N].

    The row is (dy + M - 1)(2M - 1) + (dx + M - 1) of query minus key, with M = `table_window`; a smaller
    window has some of the offsets only.
    """
    places = np.indices((window, window)).reshape(2, -1)
    dy, dx = places[:, :, None] - places[:, None, :]  # [N, N] each
    return (dy + table_window - 1) * (2 * table_window - 1) + dx + table_window - 1


def resize_relative_bias(table: jax.Array, old_window: int, new_window: int) -> jax.Array:
    """Resamples a table [(2 old - 1)^2, heads] bicubically for a new window: [(2 new - 1)^2, heads].

    As in the paper's fine-tuning at a larger window: half-pixel centres, the cubic kernel with a = -0.75,
    repeated borders and no antialiasing.
    """
    if old_window == new_window:
        return table
    old, new = 2 * old_window - 1, 2 * new_window - 1
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(centre - first - tap)
        near = 1.25 * t**3 - 2.25 * t**2 + 1
        far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        source = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), source), np.where(t <= 1, near, far))
    w = jnp.asarray(weights, jnp.float32)
    square = jnp.reshape(table, (old, old, -1))
    return jnp.einsum("yi,xj,ijh->yxh", w, w, square, precision="highest").reshape(new * new, -1)


def attend_in_windows(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, scale: float | None
) -> jax.Array:
    """Applies `dot_product_attention` in each window.

    q, k, v [B, n, N, heads, d], bias [n or 1, heads, N, N] -> [B, n, N, heads, d].
    """
    return jax.vmap(dot_product_attention, in_axes=(0, 0, 0, None, None))(q, k, v, bias, scale)
