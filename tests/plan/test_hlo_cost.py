"""What is read from a compiled program's text, against programs whose work is known."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from scaling.plan import hlo_cost, hlo_text

MESH = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def facts(fn: Any, *args: Any, **options: Any) -> hlo_cost.ProgramCost:
    return hlo_cost.program_cost(jax.jit(fn, **options).lower(*args).compile().as_text())


def array(*shape: int, spec: P | None = None) -> jax.ShapeDtypeStruct:
    place = None if spec is None else NamedSharding(MESH, spec)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)


def test_matmuls_in_nested_loops_are_multiplied_out() -> None:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        def inner(x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ w), None

        def outer(x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return jax.lax.scan(inner, x, length=5)[0], None

        return jax.lax.scan(outer, x, length=3)[0] @ w

    assert facts(fn, array(8, 64), array(64, 64)).macs == (3 * 5 + 1) * 8 * 64 * 64


@pytest.mark.parametrize(
    ("stride", "padding", "expected"),
    [(1, ((0, 0), (0, 0)), 6 * 6 * 9), (1, ((1, 1), (1, 1)), 22 * 22), (2, ((1, 1), (1, 1)), 11 * 11)],
)
def test_convolutions_are_counted_without_their_padding(stride: int, padding: Any, expected: int) -> None:
    """3x3 on 8x8: 22 of 24 places along an axis meet a real pixel with padding 1, 11 of 12 with stride 2."""

    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert facts(fn, array(2, 8, 8, 4), array(3, 3, 4, 16)).macs == 2 * expected * 4 * 16


def test_collectives_by_kind_bytes_and_group() -> None:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        whole = jax.lax.with_sharding_constraint(w, NamedSharding(MESH, P()))
        return jnp.sum(x @ whole)

    read = facts(fn, array(16, 64, spec=P("data")), array(64, 32, spec=P("fsdp")))
    assert read.macs == 8 * 64 * 32
    found = {c.kind: c for c in read.collectives}
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert (gather.bytes, gather.group, gather.count) == (64 * 32 * 4, (0, 1, 2, 3), 1)
    assert (reduce.bytes, reduce.group) == (4, (0, 4))


@pytest.mark.parametrize("unroll", [1, 32])
def test_a_layer_of_a_stack_is_what_a_loop_reads(unroll: int) -> None:
    def fn(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ jnp.sin(w), None), x, stack, unroll=unroll)[0]

    read = facts(fn, array(8, 128), array(32, 128, 128))
    stack = 32 * 128 * 128 * 4
    assert stack < read.hbm_bytes < 4 * stack  # each layer a few times, and not the stack at every layer


STACK = """%writing (p.0: bf16[64,4], p.1: bf16[4], p.2: s32[]) -> bf16[64,4] {
  %p.0 = bf16[64,4]{1,0} parameter(0)
  %p.1 = bf16[4]{0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %same = bf16[64,1,4]{2,1,0} bitcast(%p.0)
  %row = bf16[1,1,4]{2,1,0} bitcast(%p.1)
  %new = bf16[64,1,4]{2,1,0} dynamic-update-slice(%same, %row, %p.2, %zero, %zero)
  ROOT %out = bf16[64,4]{1,0} bitcast(%new)
}

ENTRY %main (a: bf16[64,4], b: bf16[4], c: s32[]) -> bf16[64,4] {
  %a = bf16[64,4]{1,0} parameter(0)
  %b = bf16[4]{0} parameter(1)
  %c = s32[] parameter(2)
  ROOT %written = bf16[64,4]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%writing
}
"""


def test_a_layer_of_a_stack_is_what_is_written_into_it() -> None:
    """Under another name, too: a row read and written, and its place."""
    assert hlo_cost.program_cost(STACK).hbm_bytes == 2 * (2 * 4) + 4


# As the TPU's compiler writes it: a loop that counts to 4 by twos, collectives in fusions, chip memory.
TPU = """HloModule jit_step, is_scheduled=true

%body.1 (p.1: (u32[], f32[8,16])) -> (u32[], f32[8,16]) {
  %p.1 = (u32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %one = u32[]{:T(128)} constant(1)
  %i = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %next = u32[]{:T(128)} add(%i, %one)
  %last = u32[]{:T(128)} add(%next, %one)
  %y = f32[8,16]{1,0:S(1)} fusion(%x), calls=%gathering, backend_config={"estimated_cycles":"700"}
  ROOT %out = (u32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%last, %y)
}

%condition.1 (p.2: (u32[], f32[8,16])) -> pred[] {
  %bound = u32[]{:T(128)} constant(4)
  %p.2 = (u32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

%gathering (q.1: f32[8,16]) -> f32[8,16] {
  %q.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %w = f32[16,16]{1,0} all-gather(%q.1), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}
  ROOT %dot.1 = f32[8,16]{1,0:T(8,128)S(1)} convolution(%q.1, %w), dim_labels=bf_io->bf
}

%starting (q.2: f32[8,16]) -> (f32[8,16], f32[16,16]) {
  %q.2 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %w.2 = f32[16,16]{1,0} all-gather(%q.2), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'a'}
  %begun = f32[16,16]{1,0} custom-call(%w.2), custom_call_target="AsyncCollectiveStart"
  %dot.2 = f32[8,16]{1,0:T(8,128)S(1)} convolution(%q.2, %w.2), dim_labels=bf_io->bf
  ROOT %both = (f32[8,16]{1,0:T(8,128)}, f32[16,16]{1,0:T(8,128)}) tuple(%dot.2, %begun)
}

ENTRY %main (a.1: f32[8,16]) -> f32[8,16] {
  %a.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %sum = f32[8,16]{1,0} all-reduce(%a.1), replica_groups={{0,1}}, backend_config={"estimated_cycles":"9"}
  %start = (f32[8,16]{1,0:T(8,128)}, f32[16,16]{1,0:T(8,128)}) fusion(%a.1), kind=kCustom, calls=%starting
  %in = (u32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%zero, %a.1)
  %loop = (u32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%in), condition=%condition.1, body=%body.1
  ROOT %r = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_what_the_tpus_compiler_writes() -> None:
    read = hlo_cost.program_cost(TPU)
    assert read.macs == 3 * 8 * 16 * 16  # once outside, twice in the loop
    assert read.cycles == 2 * 700
    reduced = hlo_cost.Collective("all-reduce", 8 * 16 * 4, (0, 1), 1.0)
    gathered = hlo_cost.Collective(
        "all-gather", 2 * 8 * 16 * 4, (0, 2), 1.0
    )  # where it begins, not in the loop
    assert read.collectives == [reduced, gathered]
    # a.1 and its sum; a.1 and the start's two results; the loop reads x twice, and writes where it is no main
    # memory. Counting takes two sums of three numbers a time.
    assert read.hbm_bytes == 4 * (4 * 8 * 16 + 16 * 16) + 2 * (4 * 8 * 16 + 2 * 3 * 4)


# Two layers, unrolled, on one channel: each gathers its weights, which goes on behind other work.
ASYNC = """%first (q.1: f32[8,16]) -> f32[16,16] {
  %q.1 = f32[8,16]{1,0} parameter(0)
  %w.1 = f32[16,16]{1,0} all-gather(%q.1), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %begun.1 = f32[16,16]{1,0} custom-call(%w.1), custom_call_target="AsyncCollectiveStart"
}

%behind (q.2: f32[8,16]) -> f32[16,16] {
  %q.2 = f32[8,16]{1,0} parameter(0)
  %w.2 = f32[16,16]{1,0} all-gather(%q.2), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %other = f32[16,16]{1,0} add(%w.2, %w.2)
}

%second (q.3: f32[8,16]) -> f32[16,16] {
  %q.3 = f32[8,16]{1,0} parameter(0)
  %w.3 = f32[16,16]{1,0} all-gather(%q.3), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %begun.2 = f32[16,16]{1,0} custom-call(%w.3), custom_call_target="AsyncCollectiveStart"
}

ENTRY %main (a: f32[8,16]) -> f32[16,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %x = f32[16,16]{1,0} fusion(%a), kind=kCustom, calls=%first
  %y = f32[16,16]{1,0} fusion(%a), kind=kCustom, calls=%behind
  ROOT %z = f32[16,16]{1,0} fusion(%a), kind=kCustom, calls=%second
}
"""


SCATTER = """%all-reduce-scatter (q: f32[16,8]) -> f32[8,8] {
  %q = f32[16,8]{1,0} parameter(0)
  %sum = f32[16,8]{1,0} all-reduce(%q), channel_id=3, replica_groups={{0,1}}
  %place = u32[] partition-id()
  ROOT %mine = f32[8,8]{1,0} dynamic-slice(%sum, %place, %place), dynamic_slice_sizes={8,8}
}

ENTRY %main (a: f32[16,8]) -> f32[8,8] {
  %a = f32[16,8]{1,0} parameter(0)
  ROOT %x = f32[8,8]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_sum_and_its_slice_in_one_fusion_are_a_reduce_scatter() -> None:
    assert hlo_cost.program_cost(SCATTER).collectives == [
        hlo_cost.Collective("reduce-scatter", 16 * 8 * 4, (0, 1), 1.0)
    ]


def test_a_collective_is_counted_where_it_begins() -> None:
    assert hlo_cost.program_cost(ASYNC).collectives == 2 * [
        hlo_cost.Collective("all-gather", 2 * 8 * 16 * 4, (0, 1), 1.0)
    ]


# As XLA writes calls of cuBLAS and cuDNN: with memory to work in, which is not main memory's traffic.
GPU = """HloModule jit_step, is_scheduled=true

ENTRY %main (x.1: bf16[8,16]) -> bf16[8,32] {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} parameter(1)
  %image = bf16[2,8,8,4]{3,2,1,0} parameter(2)
  %kernel = bf16[16,3,3,4]{3,2,1,0} parameter(3)
  %dy = bf16[2,8,8,16]{3,2,1,0} parameter(4)
  %q = bf16[2,10,3,64]{3,2,1,0} parameter(5)
  %k = bf16[2,20,3,64]{3,2,1,0} parameter(6)
  {line}
}
"""
MATMUL = """backend_config={"gemm_backend_config":{"dot_dimension_numbers":{
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}""".replace("\n", "")
LABELS = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
ATTENTION = "(bf16[2,3,10,64]{3,2,1,0}, f32[2,3,10]{2,1,0}, u8[0]{0})"


@pytest.mark.parametrize(
    ("kind", "target", "operands", "rest", "macs", "moved"),
    [
        ("(bf16[8,32], s8[4096])", "cublas$lt$matmul", "%x, %w", MATMUL, 8 * 16 * 32,
         2 * (8 * 16 + 16 * 32 + 8 * 32)),
        ("(bf16[2,8,8,16], u8[99])", "cudnn$convForward", "%image, %kernel", LABELS, 2 * 22 * 22 * 4 * 16,
         2 * (2 * 64 * 4 + 16 * 9 * 4 + 2 * 64 * 16)),
        ("(bf16[2,8,8,4], u8[99])", "cudnn$convBackwardInput", "%dy, %kernel", LABELS,
         2 * 22 * 22 * 4 * 16, 2 * (2 * 64 * 4 + 16 * 9 * 4 + 2 * 64 * 16)),
        ("(bf16[16,3,3,4], u8[99])", "cudnn$convBackwardFilter", "%image, %dy", LABELS,
         2 * 22 * 22 * 4 * 16, 2 * (2 * 64 * 4 + 16 * 9 * 4 + 2 * 64 * 16)),
        (ATTENTION, "cudnn$fmhaSoftmax", "%q, %k, %k", "", 2 * 2 * 3 * 10 * 20 * 64,
         2 * 2 * 3 * 64 * (10 + 20 + 20 + 10) + 4 * 2 * 3 * 10),
        (ATTENTION, "cudnn$fmhaSoftmaxBackward", "%q, %k, %k", "", 5 * 2 * 3 * 10 * 20 * 64,
         2 * 2 * 3 * 64 * (10 + 20 + 20 + 10) + 4 * 2 * 3 * 10),
        ("bf16[8,16]", "annotate", "%x", "", 0, 2 * 2 * 8 * 16),
    ],
)  # fmt: skip
def test_what_the_gpus_compiler_writes(
    kind: str, target: str, operands: str, rest: str, macs: int, moved: int
) -> None:
    name = target if target == "annotate" else f"__{target}"
    line = f'ROOT %out = {kind} custom-call({operands}), custom_call_target="{name}", {rest}'
    read = hlo_cost.program_cost(GPU.replace("{line}", line))
    assert (read.macs, read.hbm_bytes, read.kernels) == (macs, moved, {name: 1})


KERNELS = """
HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[2,3,10,64], k: bf16[2,3,20,64], mask: s8[1,1,1]) -> f32[3,10,64] {
  %q = bf16[2,3,10,64]{3,2,1,0} parameter(0)
  %k = bf16[2,3,20,64]{3,2,1,0} parameter(1)
  %mask = s8[1,1,1]{2,1,0} parameter(2)
  %splash_mha_fwd_residuals.1 = f32[3,10,64]{2,1,0} custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(step)/attention"}
  %splash_mha_dkv_no_residuals.1 = f32[3,10,64]{2,1,0} custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call"
  %splash_mha_dq_no_residuals.1 = f32[3,10,64]{2,1,0} custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call"
  ROOT %other.1 = f32[3,10,64]{2,1,0} custom-call(%mask), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


def test_a_tpus_attention_has_no_cycles_but_matmuls() -> None:
    """Two forwards, four for keys and values, three for queries; the compiler's estimate has none of them."""
    work = 9 * 2 * 3 * 10 * 20 * 64
    read = hlo_cost.program_cost(KERNELS, flops=2 * work, hbm_bytes=1e9)
    assert (read.macs, read.cycles, read.kernels) == (work, 0, {"tpu_custom_call": 4})
    assert read.attention == read.seconds == pytest.approx(1, rel=1e-3)
    assert hlo_cost.program_cost(TPU, flops=1).attention == 0


def test_an_instruction_takes_the_longer_of_its_matmuls_and_its_bytes() -> None:
    """Also matmuls within a fusion, three times here; collectives are no part of it."""
    line = f'ROOT %out = bf16[8,32] custom-call(%x, %w), custom_call_target="__cublas$gemm", {MATMUL}'
    text, work = GPU.replace("{line}", line), 2 * 8 * 16 * 32
    moved = hlo_cost.program_cost(text).hbm_bytes
    assert hlo_cost.program_cost(text, flops=work, hbm_bytes=moved / 0.5).seconds == 1
    assert hlo_cost.program_cost(text, flops=work, hbm_bytes=moved / 3).seconds == 3
    assert hlo_cost.program_cost(TPU, flops=2 * 8 * 16 * 16).seconds == 3
    assert (
        hlo_cost.program_cost(TPU, hbm_bytes=1).seconds
        == hlo_cost.program_cost(TPU).hbm_bytes - 2 * 4 * 8 * 16
    )


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}", (0, 1, 2, 3)),
        ("source_target_pairs={{0,3},{3,0}}, channel_id=1", (0, 3)),
        ("dimensions={0}", ()),
    ],
)
def test_groups_however_they_are_written(text: str, group: tuple[int, ...]) -> None:
    line = f"%x = f32[8]{{0}} all-gather(%a), {text}"
    one = hlo_cost.program_cost(
        f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n  {line}\n}}\n"
    ).collectives
    assert [c.group for c in one] == [group]


def test_loops_without_a_word_on_their_length() -> None:
    counted = Counter(times for _, times, _ in hlo_text.runs(*hlo_text.parse(TPU)))
    assert counted == {1.0: 2, 2.0: 2}
