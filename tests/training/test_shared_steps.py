"""Runs that differ only in traced values share what is compiled, and a run leaves no array behind."""

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from scaling.errors import UserError
from scaling.evaluators.generate import make_generator
from scaling.run import build, state
from scaling.run.build import Run
from scaling.run.folder import read_events
from scaling.training import config, loop

Tiny = dict[str, str]
OTHER_VALUES = ["train.seed=3", "optimizer.learning_rate=2e-3", "optimizer.weight_decay=0.1"]
DROPOUT = ["objective.condition_dropout=0.3"]  # of the diffusion run, which alone has it


@pytest.fixture
def traces() -> Iterator[list[str]]:
    """The functions that jax traces from now on."""
    names: list[str] = []

    def note(event: str, seconds: float, **about: object) -> None:
        if event.endswith("jaxpr_trace_duration"):
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize(("name", "values"), [("dit", OTHER_VALUES + DROPOUT), ("vit", OTHER_VALUES)])
def test_another_seed_and_rate_trace_nothing_anew(
    name: str, values: list[str], tmp_path: Path, tiny: Tiny, traces: list[str]
) -> None:
    loop.train(config.load(tiny[name]), tmp_path / "first")
    traces.clear()
    loop.train(config.load(tiny[name], values), tmp_path / "second")
    assert traces == []
    first, second = (read_events(tmp_path / run)[-1]["values"] for run in ("first", "second"))
    assert first.keys() == second.keys() and first != second
    longer = build.build(config.load(tiny[name], ["train.duration=9 steps"]))
    state.make_step(longer).trace(state.abstract(longer), longer.batch(16), state.traced_hparams(longer))
    assert any("step" in traced for traced in traces)


@pytest.mark.parametrize(
    "override",
    [
        "train.duration=30 steps", "optimizer.warmup=3 steps", "optimizer.weight_decay_mode=l2",
        "optimizer.ema_decays=(0.5,)", "data.batch_size=32", "mesh.fsdp=2", "objective.prediction=x",
        "model.depth=1", "model.remat=full",
    ],
)  # fmt: skip
def test_other_code_is_not_shared(override: str, tiny: Tiny) -> None:
    first, second = (build.build(config.load(tiny["dit"], overrides)) for overrides in ([], [override]))
    assert state.make_step(first) is not state.make_step(second)
    assert state.make_step(first) is state.make_step(build.build(first.config))


def test_other_devices_and_data_are_other_code(tiny: Tiny) -> None:
    cfg = config.load(tiny["dit"])
    run = build.build(cfg)
    smaller = Run(cfg, run.mesh, build.made_for(cfg), run.objective)
    assert len({id(state.make_step(r)) for r in (run, smaller, build.build(cfg, jax.devices()[:2]))}) == 3


def test_a_run_leaves_no_array_behind(tmp_path: Path, tiny: Tiny) -> None:
    gc.collect()
    before = len(jax.live_arrays())
    for name in ("dit", "vit"):
        loop.train(config.load(tiny[name]), tmp_path / name)
    gc.collect()
    assert len(jax.live_arrays()) == before


def test_guidance_is_refused_for_the_run_that_cannot_have_it(tiny: Tiny) -> None:
    """Though another run, with which it shares the sampler, can."""
    for dropout in ("0.1", "0.0"):
        overrides = [f"objective.condition_dropout={dropout}", "sampling.guidance_scale=2.0"]
        run = build.build(config.load(tiny["dit"], overrides))
        if dropout == "0.0":
            with pytest.raises(UserError, match="no null condition was trained"):
                make_generator(run, run.config.sampling, 8, {})
        else:
            generate = make_generator(run, run.config.sampling, 8, {})
            assert next(generate(state.eval_weights(state.init(run)), 8)).images.shape == (8, 8, 8, 1)
