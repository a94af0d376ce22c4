"""The TPU's own compiler, where it is installed (the extra tpu): what a step needs there."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaling.errors import UserError
from scaling.plan import hardware, report, search
from scaling.plan.compiler import Compiler, Request

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WIDE = ["model.width=192", "model.heads=2"]


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler("v5e:2x4") as made:
        yield made


def request(name: str = "vit", mesh: str = "fsdp=8", topology: str = "v5e:2x4", **more: object) -> Request:
    asked = Request(str(ROOT / f"tests/support/tiny_{name}.py"), topology, WIDE, **more)  # type: ignore[arg-type]
    return search.with_mesh(asked, search.mesh_of(mesh))


@pytest.mark.parametrize("topology", ["v5e:2x4", "v4:2x2x2", "v5p:2x2x2", "v6e:2x4"])
def test_a_step_on_every_kind_of_chip(compiler: Compiler, topology: str) -> None:
    made = search.one(compiler, request(topology=topology, batch=64))
    assert made.fits and made.chips == 8 and made.steps == 8
    assert made.work_ratio == pytest.approx(1.0, abs=0.02)
    axes = {row["axes"] for row in made.collectives}
    assert axes == {"fsdp"} and any(row["kind"] == "all-gather" for row in made.collectives)
    assert 0 < made.milliseconds["cycles"] <= made.step_time_ms and 0 < (made.mfu or 0) < 1


@pytest.mark.parametrize(
    "topology", ["v5e:1x1", "v6e:1x1", "v5e:16x16", "v4:4x8x8", "v5p:4x8x8", "v6e:16x16"]
)
def test_from_one_chip_to_256(compiler: Compiler, topology: str) -> None:
    chips = math.prod(hardware.slice_of(topology)[1])
    fsdp = min(chips, 16)
    made = search.one(
        compiler, request(mesh=f"data={chips // fsdp},fsdp={fsdp}", topology=topology, batch=512)
    )
    assert made.fits and made.chips == chips and 0 < (made.mfu or 0) < 1
    assert bool(made.collectives) == (chips > 1)


def test_weights_are_gathered_twice_in_bfloat16_and_their_gradients_reduced_once(
    compiler: Compiler,
) -> None:
    """At most 2 x 2 bytes of a parameter; and 2, besides a ring's last hop."""
    overrides = ["model.remat='dots'", "model.depth=2"]
    asked = Request(str(ROOT / "configs/dit.py:S/2"), "v5e:2x4", overrides, batch=128)
    asked = search.with_mesh(asked, search.mesh_of("fsdp=8"))
    found = compiler.ask(vars(asked))
    params, moved = found["cost"]["params"], {"gathered": 0.0, "reduced": 0.0}
    for row in found["facts"]["collectives"]:
        kind = "gathered" if row["kind"] in ("all-gather", "all-to-all") else "reduced"
        moved[kind] += row["count"] * row["bytes"]
    assert 3.5 * params < moved["gathered"] <= 4 * params
    assert moved["reduced"] == pytest.approx(2 * params, rel=0.05)


def test_attention_of_many_tokens_is_a_kernel(compiler: Compiler) -> None:
    """Forwards and, in two, backwards, once a layer each: `dots` keeps what the kernel gave."""
    overrides = ["model.remat='dots'", "model.depth=2"]
    asked = Request(str(ROOT / "configs/dit.py:S/2"), "v5e:2x4", overrides, batch=8, side=64)
    asked = search.with_mesh(asked, search.mesh_of("fsdp=4,tensor=2"))
    found = compiler.ask(vars(asked))
    assert found["facts"]["kernels"]["tpu_custom_call"] == 2 * 3
    made = search.one(compiler, asked)
    assert made.milliseconds["attention"] > 0 and any("attention" in note for note in made.notes)
    few = compiler.ask(vars(dataclasses.replace(asked, side=62)))
    assert "tpu_custom_call" not in few["facts"]["kernels"]


def test_axes_of_a_mesh_are_told_apart(compiler: Compiler) -> None:
    made = search.one(compiler, request(mesh="data=2,fsdp=2,tensor=2", batch=64))
    assert made.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    axes = {row["axes"] for row in made.collectives}
    assert {"fsdp", "tensor"} <= axes and any("data" in each for each in axes)


def test_sampling_and_evaluation(compiler: Compiler) -> None:
    for name, what in (("dit", "sample"), ("vit", "evaluate"), ("dit", "evaluate")):
        made = search.one(compiler, request(name, what=what, batch=64))
        assert made.fits and made.step_time_ms > 0 and made.chip_hours is None


def test_what_does_not_fit_says_what_it_needs(compiler: Compiler) -> None:
    made = search.one(compiler, request(batch=2**23))
    assert not made.fits and made.hbm_gib_needed > 2 * made.hbm_gib_available == 31.5
    assert "does not fit" in report.text(made, None)


def test_what_only_the_loss_can_know_is_one_line(compiler: Compiler) -> None:
    asked = Request(str(ROOT / "configs/clip.py:ViT-B/32"), "v5e:2x4", ["mesh.fsdp=8", "mesh.data=1"])
    with pytest.raises(UserError, match=r"^objective.chunk=4096: must divide the batch of 1024$"):
        search.one(compiler, dataclasses.replace(asked, batch=1024))
