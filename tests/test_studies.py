"""The studies that ship: what they vary, and (slowly) what they find."""

import os
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from scaling import models
from scaling.study import launch, results, sweep
from scaling.training import config

ROOT = Path(__file__).parents[1]
STUDIES = sorted(p.parent for p in (ROOT / "experiments").glob("*/study.py"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda p: p.name)
def test_every_run_of_every_study_is_a_checked_config(folder: Path) -> None:
    study = sweep.load(folder)
    shapes: dict[str, set[tuple[Any, ...]]] = {}
    for overrides in study.sweep:
        chosen = config.load(str(ROOT / study.config_of(overrides)), overrides).model
        model: Any = models.make(chosen.name, chosen.variant, **chosen.options)
        facts = [getattr(model, name, None) for name in ("depth", "depths", "width", "patch")]
        shapes.setdefault(chosen.name, set()).add(tuple(facts))
    if "optimizer.learning_rate" in study.sweep[0]:
        return  # a study of rates needs no nine sizes
    assert sum(map(len, shapes.values())) >= 9
    assert all(len(distinct) >= 3 for distinct in shapes.values())
    for distinct in shapes.values() if len(shapes) == 1 else ():
        assert len({shape[:3] for shape in distinct}) >= 3 and len({shape[3] for shape in distinct}) == 3


@pytest.mark.slow
def test_the_demo_shows_the_trend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make demo` runs: at least four measured steps a run, and a distance that falls with gmacs."""
    monkeypatch.chdir(ROOT)
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        monkeypatch.delenv(name)
    assert launch.sweep(Path("experiments/mnist_dit"), tmp_path, workers=os.cpu_count() or 1) == 0
    table = results.load(tmp_path)
    assert (table.groupby("run").size() >= 4).all()
    last = table[table.step == table.step.max()]
    assert spearmanr(last.gmacs, last.fd_mnist).statistic <= -0.9
