"""Layers shared by the transformer families: patches, positions, attention, MLP, and a stack of blocks.

Activations are [B, N, D]: examples, tokens, width. Parameters are float32; a module's `dtype` is that of its
arithmetic. Softmax and the statistics of LayerNorm are always float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling.errors import UserError
from scaling.models.attention import dot_product_attention, keeps_products
from scaling.models.matmuls import dot_general
from scaling.models.placement import constrain, layer
from scaling.models.roles import NORM, VECTOR, Part, Role
from scaling.models.variants import side_lengths

Remat = Literal["none", "full", "dots"]
REMAT: dict[str, Any] = {  # policies of what stays in memory for the backward pass, which recomputes the rest
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": keeps_products,
}

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),  # exact, by erf
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP
}

Init = nn.initializers.Initializer

xavier = nn.initializers.xavier_uniform()
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # bound 1 / sqrt(fan in)
Dense = functools.partial(nn.Dense, kernel_init=xavier, dot_general=dot_general)


def uniform(bound: float) -> Init:
    """Returns the initialiser U(-bound, bound)."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

    return init


class Kernels(NamedTuple):
    """Initialisers of the kernels of attention (values have the key's) and MLP; those of biases are zeros."""

    query: Init
    key: Init
    out: Init
    up: Init
    down: Init


XAVIER = Kernels(*(xavier,) * 5)
# Query, key and value are initialised as slices of one fused [D, 3D] kernel, whose Xavier bound is
# sqrt(6 / (D + 3D)), where that of three separate kernels is sqrt(6 / 2D): half the variance.
_fused = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
FUSED_INIT = XAVIER._replace(query=_fused, key=_fused)


# Patches and positions


def patch_grid(shape: Sequence[int], patch: int) -> tuple[int, int]:
    """Returns the numbers of patches down and across an image of `shape` [..., H, W, C].

    Raises:
        UserError: if `patch` does not divide H and W.
    """
    height, width = shape[-3:-1]
    if height % patch or width % patch:
        raise UserError(
            f"patch={patch}: must divide the input's height and width, which are {height}x{width}"
        )
    return height // patch, width // patch


def position_grid(resolution: int | tuple[int, int], patch: int) -> tuple[int, int]:
    """Returns the (h, w) grid of patches of a position table that is made for a `resolution`."""
    return patch_grid((*side_lengths(resolution), 1), patch)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Splits [B, H, W, C] -> [B, N, patch * patch * C]: patches, and pixels within them, in reading order."""
    batch, _, _, channels = x.shape
    rows, columns = patch_grid(x.shape, patch)
    x = x.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(x: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
    """Joins patches [B, N, patch * patch * C] -> [B, H, W, C], the inverse of `patchify`."""
    rows, columns = grid
    x = x.reshape(x.shape[0], rows, columns, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows * patch, columns * patch, -1)


def sincos_positions(grid: Sequence[int], width: int) -> np.ndarray:
    """Returns fixed sine and cosine positions [N, width] float32 of an n-d grid, whose last axis is fastest.

    Each axis has width / n channels, the last axis first, as DiT and MAE order them: for a [H, W] grid the
    first half encodes the column, the second half the row. Within an axis, all sines and then all cosines of
    `position * 10000^(-2i / (width / n))` (Vaswani et al. 2017, section 3.5).

    Raises:
        UserError: if `width` is not a multiple of 2n.
    """
    if width % (2 * len(grid)):
        raise UserError(f"width={width}: must be a multiple of {2 * len(grid)} for positions on this grid")
    half = width // (2 * len(grid))
    frequencies = 10000.0 ** (-np.arange(half) / half)
    parts = []
    for coordinate in reversed(np.indices(tuple(grid)).reshape(len(grid), -1)):  # [N]
        angles = np.outer(coordinate, frequencies)  # [N, half]
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def resize_positions(
    table: jax.Array, old: tuple[int, int], new: tuple[int, int], extra: int = 0
) -> jax.Array:
    """Resamples a learned table [extra + h * w, D] for an `old` (h, w) grid bicubically for a `new` one.

    Pixels have half-pixel centres, and a grid that shrinks is antialiased, as in timm's
    `resample_abs_pos_embed`. The first `extra` rows, of class tokens, are unchanged.
    """
    if old == new:
        return table
    width = table.shape[-1]
    grid = jax.image.resize(table[extra:].reshape(*old, width), (*new, width), "bicubic")  # [h', w', D]
    return jnp.concatenate([table[:extra], grid.reshape(-1, width)])


def said_resized(name: str, old: Sequence[int], new: Sequence[int], of: str = "patches") -> str:
    """Returns the message about a table that was resized from an `old` grid to a `new` one."""
    before, after = ("x".join(map(str, grid)) for grid in (old, new))
    return f"{name}: resized from {before} to {after} {of}"


def sincos_embedding(t: jax.Array, width: int, shift: int = 0) -> jax.Array:
    """Embeds t [B] -> [B, width] float32: cosines, then sines, of `t * 10000^(-i / (width / 2 - shift))`."""
    half = width // 2
    frequencies = jnp.asarray(np.exp(-math.log(10000) * np.arange(half) / (half - shift)), jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]  # [B, half]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def prepended(token: jax.Array, x: jax.Array) -> jax.Array:
    """Prepends a learned token [1, D] to each sequence of x [B, N, D]: [B, 1 + N, D], in the dtype of x."""
    first = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
    return jnp.concatenate([first, x], axis=1)


# Blocks


def layer_norm(
    x: jax.Array, name: str, *, epsilon: float = 1e-6, scale: bool = True, bias: bool = True
) -> jax.Array:
    """Applies LayerNorm over the last axis, in float32; the result has the dtype of x."""
    norm = nn.LayerNorm(
        epsilon=epsilon,
        use_scale=scale,
        use_bias=bias,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels digits
        dtype=jnp.float32,
        name=name,
    )
    return norm(x.astype(jnp.float32)).astype(x.dtype)


class Embed(nn.Embed):
    """A table of embeddings, looked up by ids: int32 [...] -> [..., features], as in `nn.Embed`.

    In compiled code, an id outside of the table, such as a negative one, gives NaN.

    Raises:
        UserError: if an id is outside of the table where ids are concrete, that is, not in compiled code.
    """

    def __call__(self, ids: jax.Array) -> jax.Array:
        if not isinstance(ids, jax.core.Tracer):
            invalid = np.asarray(ids)[(np.asarray(ids) < 0) | (np.asarray(ids) >= self.num_embeddings)]
            if invalid.size:
                raise UserError(f"{self.name}: has {self.num_embeddings} rows, and no id {invalid.flat[0]}")
        # A negative id would count from the table's end.
        return super().__call__(jnp.where(ids < 0, self.num_embeddings, ids))


class Attention(nn.Module):
    """Multi-head attention of x [..., N, D] to itself, or to a context [..., M, K]: [..., N, features].

    Query, key and value are separate kernels [D, heads, head_width]; `features` is D and `head_width` is
    D / heads unless given. With `qk_norm`, queries and keys pass through LayerNorm with a scale and no bias
    (Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters"). A `bias` float32 [B or 1,
    heads or 1, N or 1, M] is added to the logits: masks, relative positions. `attend` is applied to queries,
    keys and values: `dot_product_attention`, or a function of the same arguments.

    Raises:
        UserError: if `heads` does not divide D and no `head_width` is given.
    """

    heads: int
    qk_norm: bool = False
    head_width: int | None = None
    features: int | None = None
    scale: float | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    kernels: Kernels = FUSED_INIT
    attend: Callable[..., jax.Array] = dot_product_attention
    dtype: Any = jnp.float32

    _HEADS = ("heads", "head_width")
    _PROJECTION = Part({"kernel": Role("matrix", ("in",), _HEADS), "bias": Role("vector", (), _HEADS)})
    ROLES = Part(
        {
            **dict.fromkeys(("query", "key", "value"), _PROJECTION),
            **dict.fromkeys(("norm_query", "norm_key"), NORM),
            "out": Part({"kernel": Role("matrix", _HEADS, ("out",)), "bias": VECTOR}),
        }
    )

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
            use_bias=self.qkv_bias,
            dtype=self.dtype,
            dot_general=dot_general,
        )
        q = project(kernel_init=self.kernels.query, name="query")(x)  # [..., N, heads, d]
        k = project(kernel_init=self.kernels.key, name="key")(source)  # [..., M, heads, d]
        v = project(kernel_init=self.kernels.key, name="value")(source)  # [..., M, heads, d]
        if self.qk_norm:
            q = layer_norm(q, "norm_query", bias=False)
            k = layer_norm(k, "norm_key", bias=False)
        q, k, v = (constrain(each, "batch", *_inner_axes(x), "heads", None) for each in (q, k, v))
        x = self.attend(q, k, v, bias, self.scale)  # [..., N, heads, d]
        out = nn.DenseGeneral(
            self.features or width,
            axis=(-2, -1),
            use_bias=self.out_bias,
            kernel_init=self.kernels.out,
            dtype=self.dtype,
            dot_general=dot_general,
            name="out",
        )
        return out(x)  # [..., N, features]


class Mlp(nn.Module):
    """Two linear layers, [..., D] -> [..., hidden] -> [..., D], with an activation between them.

    With `gated`, the first layer's output has no activation and is multiplied by that of a third layer, which
    has (Shazeer 2020, "GLU Variants Improve Transformer", equation 6).
    """

    hidden: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    kernels: Kernels = FUSED_INIT
    dtype: Any = jnp.float32

    _ENTER = Part({"kernel": Role("matrix", ("in",), ("hidden",)), "bias": Role("vector", (), ("hidden",))})
    _LEAVE = Part({"kernel": Role("matrix", ("hidden",), ("out",)), "bias": VECTOR})
    ROLES = Part({"up": _ENTER, "gate": _ENTER, "down": _LEAVE})

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)
        enter = functools.partial(dense, self.hidden, kernel_init=self.kernels.up)
        activation, h = ACTIVATION_FUNCTIONS[self.activation], enter(name="up")(x)  # [..., hidden]
        h = h * activation(enter(name="gate")(x)) if self.gated else activation(h)
        h = constrain(h, "batch", *_inner_axes(x), "mlp")
        return dense(x.shape[-1], kernel_init=self.kernels.down, name="down")(h)  # [..., D]


def _inner_axes(x: jax.Array) -> tuple[str | None, ...]:
    """Returns names of the axes of x [B, ..., D] between its first and last; those of maps have none."""
    return ("token",) if x.ndim == 3 else (None,) * (x.ndim - 2)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a residual branch [B, ...] for whole examples.

    Branches that are kept are divided by 1 - rate. Draws come from the "dropout" stream. In evaluation the
    rate is None, and nothing is dropped.
    """

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | None) -> jax.Array:
        if rate is None:
            return x
        shape = (x.shape[0], *(1,) * (x.ndim - 1))
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
        return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0)


def drop_rates(last: float, depth: int, train: bool) -> jax.Array | None:
    """Returns the blocks' rates of stochastic depth [depth], from 0 linearly to `last`, or None for none."""
    return jnp.linspace(0, last, depth) if train and last else None


class EncoderBlock(nn.Module):
    """The pre-norm transformer block (Dosovitskiy et al. 2021, equations 2 and 3): [B, N, D] -> [B, N, D].

    `bias` is attention's, `drop` the rate of stochastic depth, `tokens` the name of axis N in sharding rules.
    """

    heads: int
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    qk_norm: bool = False
    epsilon: float = 1e-6
    kernels: Kernels = FUSED_INIT
    attend: Callable[..., jax.Array] = dot_product_attention
    tokens: str = "token"
    dtype: Any = jnp.float32

    ROLES = Part({"norm_attention": NORM, "attention": Attention.ROLES, "norm_mlp": NORM, "mlp": Mlp.ROLES})

    @nn.compact
    def __call__(
        self, x: jax.Array, bias: jax.Array | None = None, *, drop: jax.Array | None = None
    ) -> jax.Array:
        hidden = round(x.shape[-1] * self.mlp_ratio)
        parts: dict[str, Any] = dict(kernels=self.kernels, dtype=self.dtype)
        attention = Attention(self.heads, self.qk_norm, attend=self.attend, **parts, name="attention")
        h = attention(layer_norm(x, "norm_attention", epsilon=self.epsilon), bias=bias)  # [B, N, D]
        x = x + DropPath(name="drop_attention")(h, drop)
        h = layer_norm(x, "norm_mlp", epsilon=self.epsilon)
        h = Mlp(hidden, self.activation, **parts, name="mlp")(h)
        x = x + DropPath(name="drop_mlp")(h, drop)
        return constrain(x, "batch", self.tokens, "embed")


def stack(
    block: nn.Module,
    depth: int,
    x: jax.Array,
    *context: jax.Array,
    drop: jax.Array | None = None,
    remat: Remat = "none",
    unroll: bool = False,
) -> jax.Array:
    """Applies `depth` copies of `block(x, *context)`, each with its own parameters, stacked [depth, ...].

    The layout is the same whether the loop is compiled once (`nn.scan`) or unrolled. `drop` [depth] gives
    each block its rate of stochastic depth. `remat` names what the backward pass recomputes: nothing
    ("none"), each block entirely ("full"), or all but the outputs of linear layers ("dots").
    """

    def step(
        block: nn.Module, x: jax.Array, drop: jax.Array | None, *context: jax.Array
    ) -> tuple[jax.Array, None]:
        rate = {} if drop is None else {"drop": drop}
        return block(x, *context, **rate), None  # type: ignore[operator]

    loop = nn.scan(
        layer(step, block, depth, REMAT.get(remat), unroll),
        variable_axes={
            "params": 0,
            "intermediates": 0,
        },  # the latter as flax captures them, if it is asked to
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *(nn.broadcast,) * len(context)),
        check_constancy_invariants=False,  # the context is constant; checking it costs another trace
        length=depth,
        unroll=depth if unroll else 1,
    )
    return loop(block, x, drop, *context)[0]
