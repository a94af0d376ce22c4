"""Strict by default: eight virtual devices, strict dtypes, no silent rank promotion."""

import os
import shutil
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Making code is most of what tests do: in one part and without XLA's fusion emitters, it takes half the time.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
if metadata.version("jaxlib").startswith("0.10."):  # newer ones end at a flag that they do not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["HF_HUB_OFFLINE"] = "1"

# Workers and the processes that they start share what they compile, and the next session finds it too.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla"
    if sum(file.stat().st_size for file in CACHE.glob("*")) > 2 * 2**30:
        shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of what small tests do

import gc
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest

from scaling.data import Data, options
from scaling.data.video import Video
from scaling.run import build, state
from scaling.run.checkpoint import Checkpoints
from scaling.run.options import Config
from tests.support.counting import Counting

ROOT = Path(__file__).parents[1]

gc.set_threshold(100_000, 20, 100)  # tracing makes many small objects, and few that are garbage
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's RNG starts afresh with each test, whatever ran before it in this worker."""
    if hasattr(request.module, "RNG"):
        monkeypatch.setattr(request.module, "RNG", np.random.default_rng(0))


# Runs of seconds, in this process or in one of their own.


@pytest.fixture
def tiny() -> dict[str, str]:
    return {"dit": str(ROOT / "tests/support/tiny_dit.py"), "vit": str(ROOT / "tests/support/tiny_vit.py")}


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """`start("train", ..., devices=1)`: the command, or another program, in a process of its own."""

    def run(
        *words: str,
        devices: int = 1,
        env: dict[str, str] | None = None,
        program: tuple[str, str] = ("-m", "scaling"),
    ) -> subprocess.Popen[str]:
        flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
        there = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **(env or {})}
        command = [sys.executable, *program, *words]
        return subprocess.Popen(
            command, env=there, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return run


def restored(workdir: Path, cfg: Config) -> Any:
    """The newest state of a run, as NumPy arrays."""
    run = build.build(cfg)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore(state.abstract(run))
    assert found is not None
    return jax.tree.map(np.asarray, found[0])


@pytest.fixture
def read_state() -> Callable[[Path, Config], Any]:
    return restored


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Data:
    dataset = options.Dataset(lambda data, split: Counting(data.video.frames))
    monkeypatch.setitem(options.DATASETS, "counting", dataset)
    return Data(
        name="counting",
        video=Video(frames=4),
        batch_size=8,
        image_size=8,
        train_transforms=("random_crop", "flip"),
        eval_transforms=("center_crop(1)",),
    )
