"""The studies that ship: what they vary, and (slowly) what they find."""

import os
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from scaling.engine import config
from scaling.study import launch, results, sweep

ROOT = Path(__file__).parents[1]
STUDIES = sorted(p.parent for p in (ROOT / "experiments").glob("*/study.py"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda p: p.name)
def test_every_run_of_every_study_is_a_checked_config(folder: Path) -> None:
    study = sweep.load(folder)
    variants = {run["model.variant"] for run in study.sweep}
    assert len(study.sweep) >= 9
    assert len({v.split("/")[0] for v in variants}) >= 3 and len({v.split("/")[1] for v in variants}) >= 3
    for overrides in study.sweep:
        config.load(str(ROOT / study.config), overrides)


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
