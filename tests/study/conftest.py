"""Study folders written as training writes them, with made-up but plausible numbers."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scaling.study import launch
from scaling.study.launchers import local
from scaling.study.metric import Metric
from tests.support.sweeps import WORKER, load_dict

SIZES = {"A": (2, 16, 1), "F": (2, 32, 2), "P": (4, 32, 2), "N": (4, 64, 4)}
PATCHES = (14, 7, 4)
STEPS = (200, 400, 600, 800)


def macs(depth: int, width: int, patch: int) -> tuple[int, float]:
    """(tokens, gmacs) of a transformer on 28 x 28 images, near enough."""
    tokens = (28 // patch) ** 2
    return tokens, depth * tokens * (12 * width**2 + 2 * tokens * width) / 1e9


def write_run(
    folder: Path,
    overrides: dict[str, Any],
    model: dict[str, int],
    values: dict[int, dict[str, float]],
    status: str = "done",
    reason: str | None = None,
    samples: bool = False,
    schedule: str = "cosine",
) -> None:
    """One run folder; `values` are the evaluations by step."""
    folder.mkdir(parents=True)
    tokens, gmacs = macs(model["depth"], model["width"], model["patch"])
    config: dict[str, Any] = {
        "train": {"duration": "800 steps", "seed": 0}, "model": {"variant": "F/7"},
        "data": {"batch_size": 64}, "optimizer": {"schedule": schedule},
    }  # fmt: skip
    for key, value in overrides.items():
        section, name = key.split(".")
        config[section][name] = value
    cost = {
        "params": 12 * model["depth"] * model["width"] ** 2, "gmacs": gmacs, "gflops": 2 * gmacs,
        "tokens": tokens, "train_flops_per_step": 6e9 * gmacs * 64,
    }  # fmt: skip
    written = {"config": config, "version": "0.1.0", "commit": "abc1234", "cost": cost, "model": model}
    (folder / "config.json").write_text(json.dumps(written))
    lines = [
        {"event": "evaluate", "step": s, "examples": 64 * s, "wall": 0.1 * s, "values": v}
        for s, v in values.items()
    ]
    lines.insert(1, {"event": "train", "step": 250, "examples": 16000, "wall": 25.0, "values": {"loss": 1.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = max(values, default=0)
    (folder / "status.json").write_text(
        json.dumps(
            {"status": status, "step": last, "steps": 800, "host": socket.gethostname(), "pid": 2**22 + 1,
             "heartbeat": time.time(), "reason": reason}
        )
    )  # fmt: skip
    if samples:
        (folder / "samples").mkdir()
        rng = np.random.default_rng(0)
        for step in (400, 800):
            noise = rng.integers(0, 255, (4 * 28, 10 * 28), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"samples/step_{step:08d}.png")


def write_study(
    root: Path,
    seeds: tuple[int, ...] = (0,),
    metric: str = "fd_mnist",
    law: tuple[float, float, float] = (15.0, 8.0, 0.45),
    noise: float = 0.03,
    samples: bool = False,
    sizes: str = "AFPN",
    schedule: str = "cosine",
) -> Path:
    """A study folder whose metric follows `law` = (E, A, alpha) in gmacs; an accuracy is 1 minus it."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    runs: dict[str, dict[str, Any]] = {}
    for size in sizes:
        for patch in PATCHES:
            for seed in seeds:
                overrides = {"model.variant": f"{size}/{patch}", "train.seed": seed}
                name = f"variant={size}-{patch}_seed={seed}"
                runs[name] = overrides
                depth, width, heads = SIZES[size]
                gmacs = macs(depth, width, patch)[1]
                E, A, alpha = law
                values: dict[int, dict[str, float]] = {}
                for step in STEPS:
                    y = (
                        (E + A * gmacs**-alpha)
                        * (1 + 0.7 * (800 / step - 1) ** 0.8)
                        * np.exp(noise * rng.normal())
                    )
                    if metric == "fd_mnist":
                        values[step] = {"fd_mnist": float(y), "fd_mnist_floor": 3.1}
                    else:
                        values[step] = {"val_loss": float(3 * y), metric: max(0.0, float(1 - y))}
                model = {"depth": depth, "width": width, "heads": heads, "patch": patch}
                write_run(root / "runs" / name, overrides, model, values, samples=samples, schedule=schedule)
    study = {
        "name": "mnist_dit", "title": "DiT on MNIST", "question": "What buys more: patches or width?",
        "metric": Metric(metric).as_json(), "tolerance": 0.1, "tune": None, "study": "experiments/mnist_dit",
        "config": "configs/mnist_dit.py:F/7", "overrides": {}, "base": {}, "runs": runs,
    }  # fmt: skip
    (root / "study.json").write_text(json.dumps(study))
    return root


def split_in_families(root: Path, vit: str) -> Path:
    """Makes the sizes of these letters ViTs, and the others Swins."""
    study = json.loads((root / "study.json").read_text())
    for overrides in study["runs"].values():
        overrides["model.name"] = "vit" if overrides["model.variant"][0] in vit else "swin"
    (root / "study.json").write_text(json.dumps(study))
    return root


@pytest.fixture(scope="session")
def make_study() -> Callable[..., Path]:
    return write_study


@pytest.fixture(scope="session")
def make_run() -> Callable[..., None]:
    return write_run


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a study over `train.seed`; the trainer is the fake one, and reports are left out."""
    monkeypatch.setattr(local, "WORKER", WORKER)
    monkeypatch.setattr(launch, "write_report", lambda root: None)
    monkeypatch.setattr(launch, "load_config", load_dict)
    monkeypatch.setattr(launch, "check_evaluators", lambda source, flags: ("fd", "other_loss"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    def write(seeds: list[int], metric: str = "fd", sweep: str = "") -> Path:
        file = tmp_path / "study.py"
        sweep = sweep or f"product({{'train.seed': {seeds}}})"
        file.write_text(
            "from scaling.study.sweep import Study, product\n"
            f"STUDY = Study(name='s', config='c.py', sweep={sweep}, metric={metric!r})\n"
        )
        return file

    return write
