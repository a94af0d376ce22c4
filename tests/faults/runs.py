"""Runs of seconds for the parts about processes: commands, their unbroken results, and what is left over."""

import atexit
import functools
import hashlib
import json
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from scaling.run import build
from scaling.run.folder import read_events, steps_in
from scaling.training import config, import_weights
from tests.faults.harness import ROOT, start_verb

CONFIG = """
from tests.support import tiny_dit

def get_config(variant="A/4"):
    config = tiny_dit.get_config(variant)
    config.data.workers = {workers}
    config.checkpoint.every = "4 steps"
    config.evaluators = dict(
        val=dict(name="metrics", every="6 steps", batch_size=128),
        grid=dict(name="grid", every="6 steps", samples=4, batch_size=4, sampling=config.sampling.to_dict()),
    )
    return config
"""
STUDY = """
from scaling.study.sweep import Study, product

STUDY = Study("tiny", {config!r}, sweep=product({{"train.seed": [0, 1]}}), metric="val_loss")
"""
HOOK = """
import atexit, os, sys, threading

folder, place, delay, signum, whose = os.environ.get("FAULTS_KILL", "|0|0|0|no one's").split("|")
count = 0

def hook(event, arguments):
    global count
    if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link"):
        return
    if not (isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(folder + "/")):
        return
    count += 1
    if count == int(place):
        kill = lambda: os.kill(os.getpid(), int(signum))
        threading.Timer(float(delay), kill).start() if float(delay) else kill()

if whose in " ".join(sys.orig_argv):
    sys.addaudithook(hook)
    if place == "0":
        atexit.register(lambda: print(count, file=open(folder + ".count", "w")))
"""  # has a process end itself at the n-th time that it opens, moves or removes something in a folder
TEMPORARY = re.compile(r"\..+\.\d+|.*orbax-checkpoint-tmp.*|psm_.*")


@dataclass(frozen=True)
class Work:
    """A command that makes a folder, and the digest of what the folder has to hold in the end."""

    words: Callable[[Path], list[str]]  # of the folder to make
    digest: Callable[[Path], str]


@functools.cache
def inputs() -> Path:
    """Returns a folder with what the commands read: configs, a study, an autoencoder, a timm checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="faults-inputs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, workers in (("threads.py", 0), ("workers.py", 2)):
        (folder / name).write_text(CONFIG.format(workers=workers))
    (folder / "hook").mkdir()
    (folder / "hook/sitecustomize.py").write_text(HOOK)
    (folder / "study.py").write_text(STUDY.format(config=str(folder / "threads.py")))
    vae = build.build(config.load(str(ROOT / "tests/support/tiny_vae.py")))
    import_weights.create_run_from_weights(vae, {"params": {}}, folder / "vae", "no other")
    _write_foreign(folder / "timm")
    return folder


def _write_foreign(folder: Path) -> None:
    """Writes a small ViT's state dict as timm names it, for 8x8 digits."""
    rng, width = np.random.default_rng(0), 16
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 5, width), "patch_embed.proj.weight": (width, 1, 4, 4),
        "patch_embed.proj.bias": (width,), "blocks.0.norm1.weight": (width,), "blocks.0.norm1.bias": (width,),
        "blocks.0.attn.qkv.weight": (3 * width, width), "blocks.0.attn.qkv.bias": (3 * width,),
        "blocks.0.attn.proj.weight": (width, width), "blocks.0.attn.proj.bias": (width,),
        "blocks.0.norm2.weight": (width,), "blocks.0.norm2.bias": (width,),
        "blocks.0.mlp.fc1.weight": (4 * width, width), "blocks.0.mlp.fc1.bias": (4 * width,),
        "blocks.0.mlp.fc2.weight": (width, 4 * width), "blocks.0.mlp.fc2.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,), "head.weight": (10, width), "head.bias": (10,),
    }  # fmt: skip
    folder.mkdir()
    save_file(
        {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}, folder / "model.safetensors"
    )


WORKS: dict[str, Work] = {
    "train": Work(lambda out: _train("threads.py", out), lambda out: run_digest(out)),
    "train with workers": Work(lambda out: _train("workers.py", out), lambda out: run_digest(out)),
    "sweep": Work(
        lambda out: ["sweep", str(inputs() / "study.py"), f"--workdir={out}"],
        lambda out: " ".join(run_digest(run) for run in sorted((out / "runs").iterdir())),
    ),
    "encode": Work(
        lambda out: [
            "encode", str(inputs() / "vae"), f"--config={ROOT}/tests/support/tiny_vae.py", f"--out={out}",
        ],
        lambda out: _digest(path.read_bytes() for path in sorted(out.iterdir()) if path.name != "lock"),
    ),
    "import": Work(
        lambda out: [
            "import", str(inputs() / "timm"), "--format=timm", f"--out={out}",
            f"--config={ROOT}/tests/support/tiny_vit.py",
        ],
        lambda out: run_digest(out),
    ),
}  # fmt: skip


def _train(name: str, out: Path) -> list[str]:
    return ["train", f"--config={inputs() / name}", f"--workdir={out}"]


@dataclass(frozen=True)
class Kill:
    """A signal that a process sends itself, after it did so much of its work, and some time later."""

    share: float  # of the places where it touches a file, or of the time where `timed`
    timed: bool
    delay: float  # seconds
    signum: signal.Signals
    whose: str  # a text in the command line of the process


@dataclass(frozen=True)
class Unbroken:
    """What a command makes when nothing happens to it."""

    digest: str
    seconds: float
    places: Mapping[str, int]  # how often its processes touch a file, by a text in their command line


@functools.cache
def unbroken(work: str) -> Unbroken:
    """Runs a command to its end, once for each of its processes."""
    places = {}
    for whose in whose_of(work):
        out = inputs() / f"unbroken {work} {whose}"
        start = time.monotonic()
        process = start_verb(WORKS[work].words(out), hook_env(out, 0, 0.0, 0, whose))
        said = process.communicate(timeout=300)[0]
        seconds = time.monotonic() - start
        assert process.returncode == 0, said
        places[whose] = int(Path(f"{out}.count").read_text())
    return Unbroken(WORKS[work].digest(out), seconds, places)


def whose_of(work: str) -> tuple[str, ...]:
    """Returns texts in the command lines of the processes that a command may lose."""
    return ("-m scaling sweep", "-m scaling.worker") if work == "sweep" else ("-m scaling",)


def hook_env(folder: Path, place: int, delay: float, signum: int, whose: str) -> dict[str, str]:
    """Returns the environment in which a process sends itself a signal."""
    paths = f"{inputs() / 'hook'}:{ROOT}"
    return {"PYTHONPATH": paths, "FAULTS_KILL": f"{folder}|{place}|{delay}|{signum:d}|{whose}"}


def run_digest(folder: Path) -> str:
    """Returns a digest of a run: the values of its events, and the arrays of its newest checkpoint."""
    events = [[e["event"], e["step"], e["examples"], e["values"]] for e in read_events(folder)]
    newest = folder / "checkpoints" / str(steps_in(folder / "checkpoints")[-1])
    checkpointer = ocp.PyTreeCheckpointer()
    kinds = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        checkpointer.metadata(newest / "state").item_metadata.tree,
    )
    arrays = jax.tree.leaves(checkpointer.restore(newest / "state", restore_args=kinds))
    pictures = [path.read_bytes() for path in sorted(folder.glob("samples/*.png"))]
    return _digest([json.dumps(events).encode(), *(np.asarray(x).tobytes() for x in arrays), *pictures])


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


# --- what is left over ---


def temporaries(folder: Path) -> list[str]:
    """Returns the temporary files and folders within a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if TEMPORARY.fullmatch(p.name))


def processes_with(mark: str) -> list[int]:
    """Returns the processes that have a text in their environment, as those that were started with it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            pass
    return found


def shared_memory() -> set[str]:
    """Returns the blocks of Python's shared memory that no process has mapped."""
    blocks = {path.name for path in Path("/dev/shm").glob("psm_*")}
    for path in Path("/proc").glob("[0-9]*/maps") if blocks else ():
        try:
            maps = path.read_text()
        except OSError:
            continue
        blocks = {block for block in blocks if block not in maps}
    return blocks
