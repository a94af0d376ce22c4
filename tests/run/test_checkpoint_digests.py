"""Bits count: what a checkpoint stores is proven, and nothing is saved without its proof."""

import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.serialization import tensorstore_utils

from scaling.errors import UserError
from scaling.run import build, checkpoint_digests, state
from scaling.run.checkpoint import Checkpoints
from scaling.training import config
from tests.support.run_folders import names


@functools.cache
def tiny() -> build.Run:
    return build.build(config.load(str(Path(__file__).parents[2] / "tests/support/tiny_vit.py")))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a checkpoint of step 8."""
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        checkpoints.save(8, state.init(tiny()), {})
    return tmp_path / "run"


def restored(run: Path, **options: Any) -> Any:
    with Checkpoints(run / "checkpoints", **options) as checkpoints:
        found = checkpoints.restore(state.abstract(tiny()))
    assert found is not None
    return found


def test_a_flipped_bit_is_found_or_changes_nothing(run: Path) -> None:
    """Of every file's bits one is drawn here; tests/faults/damage.py draws 200."""
    whole, step = restored(run, read_only=True)
    rng, found = np.random.default_rng(0), 0
    for file in sorted(path for path in (run / "checkpoints/8").rglob("*") if path.is_file()):
        before = file.read_bytes()
        for place in rng.integers(8 * len(before), size=min(8 * len(before), 1)).tolist():
            data = bytearray(before)
            data[place // 8] ^= 1 << place % 8
            file.write_bytes(data)
            try:
                state, at = restored(run, read_only=True)
            except UserError as e:
                assert "no checkpoint there can be read" in str(e)
                found += 1
            else:
                assert at == step
                jax.tree.map(np.testing.assert_array_equal, state, whole)
        file.write_bytes(before)
    assert found > 3


def test_a_checkpoint_of_before_checksums_is_restored(run: Path) -> None:
    whole, step = restored(run, read_only=True)
    stored = (run / "checkpoints/8/state").resolve()
    shutil.rmtree(stored)
    with ocp.StandardCheckpointer() as former:
        former.save(stored, whole)
    assert not list(stored.glob("digests.json"))
    again, at = restored(run)
    assert at == step
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_without_checksums_nothing_is_saved(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax has no option for them: should it store arrays in another way, saving fails."""
    state, _ = restored(run)
    monkeypatch.setattr(checkpoint_digests._checksums, "added", 0)
    monkeypatch.setattr(tensorstore_utils, "build_array_write_spec", checkpoint_digests._checksums.build)
    with pytest.raises(RuntimeError, match="stores no checksums"), Checkpoints(tmp_path / "new") as new:
        new.save(1, state, {})
    assert not names(tmp_path / "new") & {"1"}
