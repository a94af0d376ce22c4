"""XLA's compiler for GPUs, where it is installed (the extra cuda): what a step needs there."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaling.plan import gpu_targets, hardware, search
from scaling.plan.compiler import Compiler, Request

ROOT = Path(__file__).parents[2]
BF16 = ["model.dtype='bfloat16'", "model.width=192", "model.heads=2"]

compiles = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the extra cuda")


def test_every_gpu_of_the_table_has_a_target() -> None:
    assert set(gpu_targets.TARGETS) == set(hardware.GPUS)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler("h200:8") as made:
        yield made


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_targets.TARGETS)
def test_a_step_on_every_kind_of_gpu(compiler: Compiler, name: str) -> None:
    """In shards: weights are gathered in bfloat16 twice, and their gradients reduced into shards once."""
    asked = Request(str(ROOT / "tests/support/tiny_vit.py"), f"{name}:8", BF16, batch=64)
    made = search.one(compiler, search.with_mesh(asked, search.mesh_of("fsdp=8")))
    assert made.fits and made.chips == 8
    assert made.work_ratio == pytest.approx(1.0, abs=0.02)
    moved = {(row["kind"], row["axes"]): row["bytes"] for row in made.collectives}
    assert moved["all-gather", "fsdp"] == pytest.approx(2 * moved["reduce-scatter", "fsdp"], rel=0.1)
    assert made.step_time_ms > 0 and any("peak rates" in note for note in made.notes)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_attention_is_a_kernel_forwards_and_backwards(compiler: Compiler, pool: str) -> None:
    """Of 5 tokens and of 4, once a layer each: `dots` keeps what the kernel gave."""
    overrides = [*BF16, f"model.pool='{pool}'", "model.remat='dots'", "model.depth=2"]
    asked = Request(str(ROOT / "tests/support/tiny_vit.py"), "h200:1", overrides)
    found = compiler.ask(vars(asked))
    kernels = {name: times for name, times in found["facts"]["kernels"].items() if "fmha" in name}
    assert kernels == {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 2}
