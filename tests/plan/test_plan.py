"""Plans: the time's terms by hand, what a search tries, and bad input before anything is compiled."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scaling import cli
from scaling.errors import UserError
from scaling.parallel.mesh import AXES
from scaling.plan import compile, hardware, report, search, step_time
from scaling.plan import compiler as plan_compiler
from scaling.plan.compiler import Compiler, Request

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests/support/tiny_dit.py")
V5E = hardware.TPUS["v5e"]
COORDS = [[x, y, 0] for x in range(16) for y in range(16)]


def test_the_table_of_chips() -> None:
    assert {chip.name: chip.flops / 1e12 for chip in hardware.TPUS.values()} == {
        "TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918,
    }  # fmt: skip
    assert all(chip.source for chip in hardware.CHIPS.values())
    assert hardware.slice_of("v5p:2x2x4") == (hardware.TPUS["v5p"], (2, 2, 4))
    assert hardware.slice_of("h200:8") == (hardware.CHIPS["NVIDIA H200"], (8,))


@pytest.mark.parametrize(
    "name",
    [
        "v9:4x4",
        "v5e",
        "v5e:4",
        "v5p:4x4",
        "v5e:0x4",
        "v5e:axb",
        "",
        "h200",
        "h200:2x4",
        "h200:16",
        "v5e:3x7",
        "v5e:4x2",
        "v5e:64x64",
        "v5p:2x2x3",
        "v5p:1x1x1",
        "v4:16x16x32",
        "v4:2x2x8",
        "v4:8x4x4",
    ],
)
def test_a_topology_that_does_not_exist(name: str) -> None:
    with pytest.raises(UserError, match=r"^topology="):
        hardware.slice_of(name)


def test_seconds_of_a_collective() -> None:
    """256 chips in a 16x16 torus: both ways around a ring of 16 at 50 GB/s, along one dimension or two."""
    row, whole = range(16), range(256)
    near = pytest.approx
    assert step_time.seconds("all-gather", 1e9, row, COORDS, V5E, (16, 16)) == near(1e9 * 15 / 16 / 100e9)
    assert step_time.seconds("reduce-scatter", 1e9, whole, COORDS, V5E, (16, 16)) == near(
        1e9 * 255 / 256 / 200e9
    )
    assert step_time.seconds("all-reduce", 1e9, row, COORDS, V5E, (16, 16)) == near(2e9 * 15 / 16 / 100e9)
    # 4 of the 16 are a line, which sends one way at a time.
    assert step_time.seconds("all-gather", 1e9, range(4), COORDS, V5E, (16, 16)) == near(1e9 * 3 / 4 / 50e9)
    assert step_time.seconds("collective-permute", 1e9, (0, 1), COORDS, V5E, (16, 16)) == near(1e9 / 50e9)
    assert step_time.seconds("all-gather", 1e9, (3,), COORDS, V5E, (16, 16)) == 0
    # Half of what 256 chips hold crosses the middle of the torus, half of it each way, over two links a row.
    assert step_time.seconds("all-to-all", 1e9, whole, COORDS, V5E, (16, 16)) == near(256e9 / 4 / (32 * 50e9))
    node = ([[i] for i in range(8)], hardware.GPUS["h200"], (8,))  # each sends to a switch at 450 GB/s
    assert step_time.seconds("all-gather", 1e9, range(8), *node) == near(1e9 * 7 / 8 / 450e9)
    assert step_time.seconds("all-to-all", 1e9, range(8), *node) == near(1e9 * 7 / 8 / 450e9)


def test_which_dimensions_are_rings() -> None:
    """cloud.google.com/tpu/docs: of v4 and v5p cubes of 4 and more, of v5e and v6e a pod's side."""
    v5p = hardware.TPUS["v5p"]
    assert v5p.rings((4, 4, 8)) == [True] * 3 and v5p.rings((2, 2, 4)) == [False] * 3
    assert V5E.rings((8, 16)) == [False, True] and V5E.rings((8, 8)) == [False] * 2
    coords = [[x, y, z] for x in range(2) for y in range(2) for z in range(4)]
    assert step_time.seconds("all-gather", 1e9, range(16), coords, v5p, (2, 2, 4)) == pytest.approx(
        1e9 * 15 / 16 / 300e9
    )


def test_collectives_are_summed_by_kind_and_axes() -> None:
    mesh = {"data": 2, "fsdp": 2, "tensor": 4}
    found = [
        dict(kind="all-gather", bytes=100.0, group=[0, 4], count=3),
        dict(kind="all-gather", bytes=50.0, group=[1, 5], count=2),
        dict(kind="all-reduce", bytes=7.0, group=[0, 4, 8, 12], count=1),
        dict(kind="all-reduce", bytes=1.0, group=[], count=1),
    ]
    rows = step_time.collectives(found, mesh, COORDS, V5E, (4, 4))
    assert {(row["kind"], row["axes"]): (row["count"], row["bytes"]) for row in rows} == {
        ("all-gather", "fsdp"): (5, 400.0),
        ("all-reduce", "data+fsdp"): (1, 7.0),
        ("all-reduce", "data+fsdp+tensor"): (1, 1.0),
    }


class Fake(Compiler):
    """A compiler by rule: fsdp shards the state, the batch activations; remat halves and quarters these."""

    def __init__(self, state_gib: float = 20.0, example_gib: float = 1.0) -> None:
        self.asked: list[dict[str, Any]] = []
        self.state_gib, self.example_gib = state_gib, example_gib

    def __exit__(self, *_: Any) -> None: ...

    def ask(self, request: Any) -> dict[str, Any]:
        self.asked.append(dict(request))
        words = dict(text.split("=", 1) for text in request["overrides"])
        mesh = {axis: int(words.get(f"mesh.{axis}", 1)) for axis in AXES}
        chips, remat = math.prod(mesh.values()), words.get("model.remat", "none")
        saved = {"none": 1.0, "dots": 0.5, "full": 0.25}[remat]
        batch = request["batch"] or int(words["data.batch_size"])
        need = self.state_gib / mesh["fsdp"] + self.example_gib * saved * batch / (
            mesh["data"] * mesh["fsdp"]
        )
        found = {
            "mesh": mesh,
            "coords": COORDS[:chips],
            "sharding_notes": [],
            "batch": batch,
            "steps": 1000,
            "needed_gib": need,
        }
        if need > V5E.hbm_gib:
            return found | {"fits": False}
        macs = (1 + (1 - saved) / 3) * 3e12 * batch / chips
        facts = dict(macs=macs, hbm_bytes=0.0, cycles=0.0, kernels={}, collectives=[])
        facts |= dict(seconds=2 * macs / V5E.flops, attention=0.0)
        memory = dict(argument=2**30, temp=2**30)
        cost = {"train_flops_per_step": 6e12 * batch}
        return found | {"fits": True, "facts": facts, "memory": memory, "cost": cost}


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as compiler:
        yield compiler


def request(**options: Any) -> Request:
    return Request(TINY, "v5e:4x4", **options)


def test_a_steps_terms() -> None:
    """Kernels without cycles are added to the others' cycles; without any cycles, all kernels are counted."""
    facts = dict(macs=197e9 / 2, hbm_bytes=0.0, seconds=5e-3, attention=2e-3, cycles=3e-3 * V5E.clock)
    terms = step_time.terms(facts, V5E) | {"network": 0.25}
    assert terms["matmuls"] == pytest.approx(1) and step_time.total(terms) == pytest.approx(3 + 2 + 0.25)
    assert step_time.total(
        step_time.terms(facts | {"cycles": 0.0}, V5E) | {"network": 0.25}
    ) == pytest.approx(5.25)


def test_time_money_and_utilisation(fake: Fake) -> None:
    asked = search.with_mesh(request(batch=64), {"data": 1, "fsdp": 16, "tensor": 1})
    made = search.one(fake, asked)
    seconds = 2 * 3e12 * 64 / 16 / 197e12
    assert made.fits and made.batch == 64
    assert made.step_time_ms == pytest.approx(1e3 * seconds)
    assert made.mfu == pytest.approx(1.0) and made.work_ratio == pytest.approx(1.0)
    assert made.chip_hours == pytest.approx(1000 * 16 * seconds / 3600)
    assert "16 chips" in report.text(made, 1.2) and "at 1.2 per chip-hour" in report.text(made, 1.2)


def test_a_search_ranks_what_fits_with_the_least_remat(fake: Fake) -> None:
    found = search.search(fake, request(batch=256))
    assert found == sorted(found, key=lambda made: made.step_time_ms / made.batch)
    assert {made.batch for made in found} == {256, 512}
    fsdp = next(made for made in found if made.mesh["fsdp"] == 16 and made.batch == 256)
    assert fsdp.remat == "dots"  # 20 / 16 + 16 GiB do not fit, with half of the activations they do
    assert all(made.mesh["fsdp"] > 1 for made in found)  # 20 GiB of state fit on no chip


def test_a_search_keeps_what_is_given(fake: Fake) -> None:
    asked = request(batch=256, overrides=["mesh.fsdp=4", "model.remat=full"])
    for made in search.search(fake, asked):
        assert made.mesh == {"data": 4, "fsdp": 4, "tensor": 1} and made.remat == "full"
    with pytest.raises(UserError, match=r"^mesh data=-1, fsdp=3, tensor=1: must multiply to the 16 chips"):
        search.search(fake, request(batch=256, overrides=["mesh.fsdp=3"]))
    free = {tuple(made.mesh.values()) for made in search.search(fake, request(batch=256))}
    assert free >= {(1, 16, 1), (2, 8, 1), (4, 4, 1), (1, 8, 2)}


def test_a_mesh_that_is_given_is_the_only_one_that_is_judged() -> None:
    with Fake(state_gib=60.0) as compiler:
        with pytest.raises(UserError, match=r"lacking on this mesh; without one --search tries others$"):
            search.search(compiler, request(batch=256, overrides=["mesh.data=16", "mesh.fsdp=1"]))
        with pytest.raises(UserError, match=r"^batch=20: must be a multiple of mesh data x fsdp = 16"):
            search.search(compiler, request(batch=20, overrides=["mesh.fsdp=16", "mesh.data=1"]))
        with pytest.raises(UserError, match=r"^batch=7: no mesh of v5e:4x4 divides it"):
            search.search(compiler, request(batch=7))


def test_what_fits_on_no_mesh_says_by_how_much_and_where_it_would() -> None:
    with Fake(state_gib=400.0) as compiler, pytest.raises(UserError) as error:
        search.search(compiler, request(batch=256))
    said = str(error.value)
    assert (
        "at best 13.2 GiB per chip are lacking" in said
        and "smallest slice on which it fits is v5e:4x8" in said
    )
    assert "\n" not in said


def test_what_fits_on_no_slice() -> None:
    with (
        Fake(state_gib=1e5) as compiler,
        pytest.raises(UserError, match=r"no larger slice, of up to 256 chips"),
    ):
        search.search(compiler, request(batch=256))
    tried = [each["topology"] for each in compiler.asked if each["topology"] != "v5e:4x4"]
    assert tried == [each for each in ("v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16") for _ in range(2)]


def test_a_study_is_compiled_once_for_runs_that_do_the_same(fake: Fake) -> None:
    asked = Request("", "v5e:4x4", ["mesh.data=1", "mesh.fsdp=16", "data.batch_size=64"])
    rows = search.study(fake, ROOT / "experiments/mnist_dit", asked)
    assert len(fake.asked) == len({name.split("_seed")[0] for name, _ in rows}) <= len(rows)
    assert all(name[:40] in report.table(rows, None) for name, _ in rows)
    total = sum(made.chip_hours or 0 for _, made in rows)
    assert f"{total:,.1f} chip-hours, {2 * total:,.0f} at 2.0 per chip-hour" in report.summed(rows, 2.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(overrides=["mesh.fsdp=3"]), r"mesh data=-1, fsdp=3, tensor=1: must multiply to the 16 chips"),
        (
            dict(overrides=["mesh.data=16"], batch=24),
            r"batch=24: must be a multiple of mesh data x fsdp = 16",
        ),
        (dict(overrides=["mesh.dat=16"]), r"mesh\.dat"),
    ],
)
def test_bad_input_ends_before_anything_is_compiled(fake: Fake, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        search.one(fake, dataclasses.replace(request(), **options))
    assert fake.asked == []
    for text in ("data=2,model=3", "fsdp", "fsdp=0", "", "fsdp=8,fsdp=4"):
        with pytest.raises(UserError, match=r"^mesh="):
            search.mesh_of(text)


KEYS = {"topology", "chips", "mesh", "fits", "hbm_gib_needed", "hbm_gib_available", "collectives"}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--config", TINY, "--mesh", "fsdp=16"], "at 3.0 per chip-hour"),
        (["--config", TINY, "--search", "--topology", "v5e:1x1"], "\nbatch=64 remat=none"),
        (["--study", str(ROOT / "experiments/mnist_dit"), "--mesh", "fsdp=16"], "one after the other"),
    ],
)
def test_the_verb_prints_one_or_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], shown: str
) -> None:
    monkeypatch.setattr(plan_compiler, "Compiler", lambda topology: Fake(state_gib=1.0, example_gib=0.1))
    verb = ["plan", "--topology", "v5e:4x4", "--global-batch", "64", "--price", "3", *options]
    assert cli.main(verb) == 0
    assert shown in capsys.readouterr().out
    assert cli.main([*verb, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    one = found if "--mesh" in options and "--config" in options else found[0]
    assert one.keys() >= KEYS | {"step_time_ms", "mfu"}


@pytest.mark.parametrize(
    ("topology", "said"),
    [("v5e:2x4", r"libtpu.*'\.\[tpu\]'"), ("h200:8", r"jax_cuda13_plugin.*'\.\[cuda\]'")],
)
def test_without_the_compiler_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, topology: str, said: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=said):
        Compiler(topology)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--global-batch=-8"], "argument --global-batch: '-8': must be a whole number from 1"),
        (
            ["--global-batch=0", "--what=evaluate"],
            "argument --global-batch: '0': must be a whole number from 1",
        ),
        (["--side=-4"], "argument --side: '-4': must be a whole number from 1"),
        (["--examples=0"], "argument --examples: '0': must be a whole number from 1"),
        (["--price=-3"], "argument --price: '-3': must be a finite number, at least 0"),
        (["--mesh="], "error: mesh='': must be like data=2"),
    ],
)
def test_numbers_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    monkeypatch.setattr(plan_compiler, "Compiler", lambda topology: Fake())
    with contextlib.suppress(SystemExit):
        assert cli.main(["plan", "--topology=v5e:4x4", f"--config={TINY}", *options]) == 2
    assert said in capsys.readouterr().err
    study = ["plan", "--topology=v5e:4x4", f"--study={ROOT / 'experiments/mnist_dit'}", "--search"]
    assert cli.main(study) == 2 and capsys.readouterr().err.startswith("error: search: is of one run")


def test_sampling_has_a_rate_and_a_price(fake: Fake) -> None:
    asked = request(batch=64, what="sample", overrides=["mesh.data=1", "mesh.fsdp=16"])
    made = search.one(fake, asked)
    assert made.chip_hours is None and made.mfu is None
    assert made.examples_per_second == pytest.approx(64e3 / made.step_time_ms)
    hours = 1e6 / made.examples_per_second / 3600 * 16
    assert f"{2 * hours:,.2f} per million examples at 2.0 per chip-hour" in report.text(made, 2.0)
    shown = report.table([("a", made)], 2.0)
    assert f" {2 * hours:,.2f}\n" in shown and shown.endswith("note: cost is per million examples")
    assert report.table([("a", made)], None).splitlines()[1].endswith(" -")


def test_a_study_sums_what_fits(fake: Fake) -> None:
    made = search.one(fake, search.with_mesh(request(batch=64), {"data": 1, "fsdp": 16, "tensor": 1}))
    rows = [("a", made), ("b", dataclasses.replace(made, fits=False))]
    assert report.summed(rows, None).startswith(f"1 of 2 runs: {made.chip_hours:,.1f} chip-hours;")


def test_data_at_hand_are_taken_as_they_are() -> None:
    for option in ("examples", "side"):
        asked = dataclasses.asdict(request(**{option: 64}))
        assert compile.answer(asked) == {
            "error": f"{option}=64: the data are at hand, 1438 examples of 8x8x1; leave it out"
        }


def test_a_model_without_a_loss_has_no_plan() -> None:
    asked = Request(str(ROOT / "configs/pretrained.py:t5/Small"), "v5e:4x4")
    assert compile.answer(dataclasses.asdict(asked))["error"].startswith(
        "objective.name='frozen': has no loss"
    )


def test_memory_that_no_chip_has() -> None:
    """What the compiler says where a program is very large."""
    for text, gib in (
        ("Used 23.05G of 15.75G hbm", 23.05),
        ("Used 512.5M of 15.75G hbm", 0.50048828125),
        ("HLO temporaries (4.37T) exceeds available HBM (15.75G)", 4474.88),
    ):
        assert compile.needed_gib(text) == pytest.approx(gib)
    assert compile.needed_gib("Mosaic failed to compile TPU kernel") is None
