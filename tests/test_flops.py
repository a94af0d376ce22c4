"""Counting multiply-adds: against counts by hand, and against XLA's own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from scaling import models
from scaling.flops import macs


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def xla_flops(fn: Callable[..., Any], *args: Any) -> float:
    return jax.jit(fn).lower(*args).cost_analysis()["flops"]


def conv(stride: int = 1, padding: int = 0, **options: Any) -> Callable[..., jax.Array]:
    numbers = ("NHWC", "HWIO", "NHWC")
    pads = ((padding, padding), (padding, padding))
    return lambda x, w: lax.conv_general_dilated(
        x, w, (stride, stride), pads, dimension_numbers=numbers, **options
    )


SQUARE = f32(4, 4)  # its product with itself: 64 multiply-adds


def test_matrix_products() -> None:
    assert macs(jnp.matmul, f32(8, 16), f32(16, 32)) == 8 * 16 * 32
    assert macs(jnp.matmul, f32(5, 8, 16), f32(5, 16, 32)) == 5 * 8 * 16 * 32
    assert macs(lambda x, y: jnp.einsum("bqhd,bkhd->bhqk", x, y), f32(2, 7, 3, 4), f32(2, 9, 3, 4)) == (
        2 * 3 * 7 * 9 * 4
    )
    assert macs(lambda x: jax.nn.softmax(jax.nn.gelu(x)) + 1, f32(8, 8)) == 0


@pytest.mark.parametrize(
    ("fn", "x", "w", "count"),
    [
        (conv(), f32(2, 9, 9, 3), f32(3, 3, 3, 8), 2 * 7 * 7 * 8 * 3 * 9),
        (conv(stride=2), f32(2, 9, 9, 3), f32(3, 3, 3, 8), 2 * 4 * 4 * 8 * 3 * 9),
        (conv(rhs_dilation=(2, 2)), f32(2, 9, 9, 3), f32(3, 3, 3, 8), 2 * 5 * 5 * 8 * 3 * 9),
        (conv(feature_group_count=3), f32(2, 9, 9, 6), f32(3, 3, 2, 9), 2 * 7 * 7 * 9 * 2 * 9),
        (conv(batch_group_count=2), f32(4, 9, 9, 6), f32(3, 3, 6, 8), 2 * 7 * 7 * 8 * 6 * 9),
        # 17 positions, every second a zero: of the 15 windows of 3, 8 hold two values and 7 hold one.
        (conv(lhs_dilation=(2, 2)), f32(2, 9, 9, 3), f32(3, 3, 3, 8), 2 * 8 * 3 * (8 * 2 + 7) ** 2),
    ],
    ids=["plain", "strided", "dilated", "feature groups", "batch groups", "transposed"],
)
def test_convolutions_by_hand_and_by_xla(
    fn: Callable[..., Any], x: jax.ShapeDtypeStruct, w: jax.ShapeDtypeStruct, count: int
) -> None:
    assert macs(fn, x, w) == count
    assert xla_flops(fn, x, w) == 2 * count


def test_padding_of_a_convolution_counts_as_in_papers() -> None:
    assert macs(conv(stride=2, padding=1), f32(1, 8, 8, 3), f32(3, 3, 3, 8)) == 4 * 4 * 8 * 3 * 9


def test_gradient_of_a_convolution_is_two_more_of_it() -> None:
    fn, x, w = conv(stride=4), f32(2, 32, 32, 3), f32(4, 4, 3, 8)  # a patch embedding
    count = macs(fn, x, w)
    assert macs(jax.grad(lambda x, w: fn(x, w).sum(), argnums=(0, 1)), x, w) == 3 * count


def dense_net(weights: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in weights:
        x = jnp.tanh(x @ w)
    return x.sum()


def test_gradient_of_a_dense_net() -> None:
    weights, x = [f32(16, 32), f32(32, 32), f32(32, 8)], f32(4, 16)
    first, others = 4 * 16 * 32, 4 * (32 * 32 + 32 * 8)
    assert macs(dense_net, weights, x) == first + others
    assert macs(jax.grad(dense_net), weights, x) == 2 * first + 3 * others  # x itself needs no gradient


@pytest.mark.parametrize("family", ["dit", "vit"])
def test_gradient_of_a_scanned_model_is_three_forwards_less_its_inputs(family: str) -> None:
    model, inputs = models.make(family, "F/7"), models.inputs(family, "F/7")
    variables = jax.eval_shape(model.init, jax.random.key(0), **inputs)
    gradient = jax.grad(lambda v, i: model.apply(v, **i).sum())
    first = 16 * 49 * 32 + (256 * 32 if family == "dit" else 0)  # patches and times are data
    forward = macs(lambda v, i: model.apply(v, **i), variables, inputs)
    assert macs(gradient, variables, inputs) == 3 * forward - first


def test_a_scan_counts_every_trip() -> None:
    def fn(x: jax.Array) -> Any:
        return lax.scan(lambda c, _: (c @ c, None), x, None, length=7)

    assert macs(fn, SQUARE) == 7 * 64
    assert macs(lambda x: lax.fori_loop(0, 7, lambda i, c: c @ c, x), SQUARE) == 7 * 64


def test_a_while_loop_within_a_scan() -> None:
    def trip(c: jax.Array, _: None) -> Any:
        return lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] @ c[1]), (0, c))[1], None

    assert macs(lambda x: lax.scan(trip, x, None, length=3)[0], SQUARE) == 3 * 5 * 64


def test_jit_remat_and_custom_derivatives_are_walked_through() -> None:
    @jax.custom_vjp
    def with_vjp(x: jax.Array) -> jax.Array:
        return x @ x

    with_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

    @jax.custom_jvp
    def with_jvp(x: jax.Array) -> jax.Array:
        return x @ x

    with_jvp.defjvp(lambda x, t: (x[0] @ x[0], t[0] @ x[0] + x[0] @ t[0]))

    for fn in (jax.jit(jax.jit(jnp.matmul)), jax.checkpoint(jnp.matmul)):
        assert macs(fn, SQUARE, SQUARE) == 64
    for fn in (with_vjp, with_jvp):
        assert macs(fn, SQUARE) == 64
        assert macs(jax.grad(lambda x, fn=fn: fn(x).sum()), SQUARE) == 3 * 64


def test_remat_in_a_gradient_counts_what_is_recomputed() -> None:
    def fn(x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.sin(x @ x) @ x).sum()

    assert macs(jax.grad(jax.checkpoint(fn)), SQUARE) == macs(jax.grad(fn), SQUARE) + 2 * 64


def test_a_cond_counts_its_costliest_branch() -> None:
    def fn(x: jax.Array) -> jax.Array:
        return lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert macs(fn, SQUARE) == 2 * 64


@pytest.mark.parametrize(
    ("start", "test", "step", "trips"),
    [
        (0, lambda i: i < 10, 1, 10),
        (0, lambda i: i <= 10, 3, 4),
        (10, lambda i: i > 0, -2, 5),
        (0, lambda i: i != 6, 2, 3),
        (0, lambda i: jnp.greater(10, i), 4, 3),
        (5, lambda i: i < 5, 1, 0),
    ],
)
def test_a_while_loop_with_a_plain_counter(
    start: int, test: Callable[[Any], Any], step: int, trips: int
) -> None:
    def fn(x: jax.Array) -> Any:
        return lax.while_loop(lambda c: test(c[0]), lambda c: (c[0] + step, c[1] @ c[1]), (start, x))

    assert macs(fn, SQUARE) == trips * 64
    assert macs(jax.jit(fn), SQUARE) == trips * 64


def test_a_while_loop_whose_limit_is_carried_or_closed_over() -> None:
    carried = lambda x: lax.fori_loop(jnp.int32(2), jnp.int32(7), lambda i, c: c @ c, x)  # noqa: E731
    assert macs(carried, SQUARE) == 5 * 64

    def closed(x: jax.Array) -> Any:
        limit = jnp.int32(7)
        return lax.while_loop(lambda c: c[0] < limit, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))

    assert macs(closed, SQUARE) == 7 * 64


def test_multiply_adds_in_the_condition_of_a_while_loop_count() -> None:
    def fn(x: jax.Array) -> Any:
        return lax.while_loop(
            lambda c: (c[1] @ c[1])[0, 0] * 0 + c[0] < 3, lambda c: (c[0] + 1, c[1]), (0, x)
        )

    with pytest.raises(ValueError, match="while loop"):  # the condition is no plain comparison
        macs(fn, SQUARE)


def test_a_while_loop_of_unknown_length_is_an_error_only_with_multiply_adds() -> None:
    def newton(body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return lambda x: lax.while_loop(lambda c: c[0, 0] < 1, body, x)

    with pytest.raises(ValueError, match="while loop"):
        macs(newton(lambda c: c @ c), SQUARE)
    assert macs(newton(lambda c: c + 1), SQUARE) == 0
    with pytest.raises(ValueError, match="while loop"):
        macs(lambda x, n: lax.fori_loop(0, n, lambda i, c: c @ c, x), SQUARE, jnp.int32(3))


def test_a_custom_kernel_is_an_error() -> None:
    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...] @ x[...]

    with pytest.raises(ValueError, match="pallas_call"):
        macs(pl.pallas_call(kernel, out_shape=f32(4, 4)), SQUARE)


def test_products_without_a_jaxpr_are_an_error() -> None:
    with pytest.raises(ValueError, match="ragged_dot"):
        macs(lax.ragged_dot, f32(8, 4), f32(2, 4, 3), jax.ShapeDtypeStruct((2,), jnp.int32))


def test_an_unknown_primitive_is_an_error_only_with_multiply_adds() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def mapped(fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec)

    with pytest.raises(ValueError, match="shard_map"):
        macs(mapped(lambda x: x @ x), SQUARE)
    assert macs(mapped(jnp.sin), SQUARE) == 0
    scatter = lambda x, i: x.at[i].add(jnp.ones((2, 4)))  # noqa: E731
    assert macs(scatter, SQUARE, jax.ShapeDtypeStruct((2,), jnp.int32)) == 0


@pytest.mark.parametrize(("family", "variant"), [("dit", "B/2"), ("vit", "B/16")])
def test_a_whole_model_against_xla(family: str, variant: str) -> None:
    # Unrolled, because XLA counts the body of a loop once; its count adds a few operations an element.
    model, inputs = models.make(family, variant, depth=2, unroll=True), models.inputs(family, variant)
    variables = jax.eval_shape(model.init, jax.random.key(0), **inputs)
    forward = lambda v, i: model.apply(v, **i)  # noqa: E731
    count = macs(forward, variables, inputs)
    assert 2 * count < xla_flops(forward, variables, inputs) < 2 * count * 1.02
    scanned = models.make(family, variant, depth=2)
    assert macs(lambda v, i: scanned.apply(v, **i), variables, inputs) == count
