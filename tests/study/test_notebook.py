"""The notebook runs from start to end: on any study folder, and as it is in a fresh clone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "scaling_curves.ipynb"


def test_notebook_draws_a_study(
    make_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALING_STUDY", str(make_study(tmp_path, sizes="AFP", samples=True)))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3 + 9  # charts and samples
    text = "".join(output.get("text", "") for output in outputs)
    assert "fd_mnist falls with gmacs" in text
    assert "exponent" in text


def test_notebook_runs_in_a_fresh_clone(tmp_path: Path) -> None:
    """With the files that ship and no others, and with the folder that it names itself."""
    shutil.copytree(NOTEBOOK.parent, tmp_path / "notebooks")
    for name in ("study.py", "results.csv"):
        (tmp_path / "experiments/mnist_dit").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "experiments/mnist_dit" / name, tmp_path / "experiments/mnist_dit")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbmake",
        "--rootdir",
        str(tmp_path),
        "-p",
        "no:cacheprovider",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "SCALING_STUDY"}
    ended = subprocess.run(
        [*command, str(tmp_path / "notebooks" / NOTEBOOK.name)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0 and "1 passed" in ended.stdout, ended.stdout + ended.stderr
