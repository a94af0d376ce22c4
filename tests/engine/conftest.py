"""Runs of seconds, in this process or in one of their own."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from scaling.engine import build, config, state
from scaling.engine.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny() -> dict[str, str]:
    return {"dit": str(ROOT / "tests/tiny_dit.py"), "vit": str(ROOT / "tests/tiny_vit.py")}


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """`start("train", ..., devices=1)`: the command in a process of its own."""

    def run(*words: str, devices: int = 1, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
        there = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **(env or {})}
        command = [sys.executable, "-m", "scaling", *words]
        return subprocess.Popen(
            command, env=there, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return run


def restored(workdir: Path, cfg: config.Config) -> Any:
    """The newest state of a run, as NumPy arrays."""
    built = build.build(cfg)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore(state.abstract(built))
    assert found is not None
    return jax.tree.map(np.asarray, found[0])


@pytest.fixture
def read_state() -> Callable[[Path, config.Config], Any]:
    return restored
