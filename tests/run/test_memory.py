"""Gradient checkpointing of videos: what the real training step needs, by XLA's own count."""

from pathlib import Path

import jax

from scaling import data
from scaling.run import build, state
from scaling.training import config

VIDEO = str(Path(__file__).parents[2] / "configs/mnist_vivit.py")


def test_remat_makes_32_frames_need_less() -> None:
    assert temporary_bytes("full") < 0.6 * temporary_bytes("none")


def temporary_bytes(remat: str) -> int:
    """Of one step on one device, beside its arguments and results; compiled and not run."""
    overrides = ["model.variant=P/7x2", f"model.remat={remat}", "data.batch_size=8"]
    info = data.Info("clips", 80, (32, 28, 28, 1), 4000)
    run = build.build(config.load(VIDEO, overrides), jax.devices()[:1], info)
    traced_hparams = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in state.traced_hparams(run).items()}
    lowered = state.make_step(run).lower(state.abstract(run), run.batch(8), traced_hparams)  # type: ignore[attr-defined]
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)
