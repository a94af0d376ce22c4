"""Damage: every file of a run and of a study in five ways, and 200 flipped bits.

A run is evaluated, and trained further; a study is reported. What was damaged is said, or it changes nothing.
"""

import atexit
import functools
import itertools
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from scaling.run.folder import read_events
from tests.faults.harness import ROOT, Case, Outcome, call_here, judge, run_verb, run_verb_here

VIT = f"--config={ROOT / 'tests/support/tiny_vit.py'}"
FLIPS = 200
SAME_AS_VERB = 10  # cases that are tried in a process of their own too
STUDY = f"""from scaling.study.sweep import Study, product

STUDY = Study(
    name="tiny",
    config={str(ROOT / "tests/support/tiny_vit.py")!r},
    sweep=product({{"model.width": [16, 24, 32]}}),
    metric="val_loss",
)
"""
REPORTED = ("results.csv", "laws.json")  # what a report computes
MADE = ("*.png", "*.svg", "*.html", "*.csv", "laws.json", "*.txt")  # what it writes anew


def _emptied(data: bytes) -> bytes:
    return b""


def _halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def _random(data: bytes) -> bytes:
    return random.Random(0).randbytes(len(data))


WAYS: dict[str, Callable[[bytes], bytes] | None] = {
    "deleted": None, "emptied": _emptied, "halved": _halved, "zeroed": _zeroed, "random": _random,
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Yields the cases of a run, then those of a study."""
    run, study = _whole() / "run", _whole() / "study"
    ways = list(itertools.product(_files(run).items(), WAYS))
    for i, ((label, name), way) in enumerate(ways):
        if i % (len(ways) // SAME_AS_VERB) == 0:
            yield Case(f"run: {label} {way}, here as by the verb", functools.partial(_as_the_verb, name, way))
        yield Case(f"run: {label} {way}", functools.partial(_try_run, name, WAYS[way]))
    for (label, name), way in itertools.product(_files(study).items(), WAYS):
        if not any(Path(name).match(pattern) for pattern in MADE) and "checkpoints" not in name:
            yield Case(f"study: {label} {way}", functools.partial(_try_study, name, WAYS[way]))
    rng, read = random.Random(0), {k: v for k, v in _files(study).items() if v.endswith((".json", ".jsonl"))}
    for i in range(FLIPS):
        kind, files, try_it = ("study", read, _try_study) if i % 4 == 3 else ("run", _files(run), _try_run)
        label, flip = rng.choice(list(files)), functools.partial(_flipped, rng.random())
        yield Case(f"flip {i}: {kind}: {label}", functools.partial(try_it, files[label], flip))


def _flipped(place: float, data: bytes) -> bytes:
    bit = int(place * 8 * len(data))
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :] if data else data


@functools.cache
def _whole() -> Path:
    """Returns a folder with a finished run, `run`, the same trained further, `further`, and a `study`."""
    folder = Path(tempfile.mkdtemp(prefix="faults-whole-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "study.py").write_text(STUDY)
    assert _train(folder / "run", 8).kind == "silent"
    shutil.copytree(folder / "run", folder / "further")
    assert _train(folder / "further", 12).kind == "silent"
    sweep = ["sweep", str(folder / "study.py"), f"--workdir={folder / 'study'}"]
    assert run_verb(sweep, seconds=300).kind == "silent"
    return folder


@functools.cache
def _files(folder: Path) -> dict[str, str]:
    """Returns the names within a folder of the files that hold anything, by labels that every run has.

    A store's file has a random name; its label is its place by size.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    labels = {}
    for path in sorted(files, key=lambda path: (path.parent, path.stat().st_size, path.name)):
        if path.parent.name == "tensorboard" or path.name == "log.txt":
            continue
        name = path.relative_to(folder)
        random_name = re.fullmatch("[0-9a-f]{32}", path.name)
        place = sum(other.startswith(f"{name.parent}/#") for other in labels)
        labels[f"{name.parent}/#{place}" if random_name else name.as_posix()] = name.as_posix()
    return labels


def _train(run: Path, steps: int) -> Outcome:
    return run_verb_here(["train", VIT, f"--workdir={run}", f"--config.train.duration={steps} steps"])


def _damage(file: Path, way: Callable[[bytes], bytes] | None) -> None:
    data = file.read_bytes()
    file.unlink()
    if way is not None:
        file.write_bytes(way(data))


# --- a run ---


def _try_run(name: str, way: Callable[[bytes], bytes] | None, folder: Path) -> Outcome:
    run = folder / "run"
    shutil.copytree(_whole() / "run", run)
    _damage(run / name, way)
    evaluated = _evaluate(run)
    if evaluated.kind not in ("clear", "fine"):
        return Outcome(evaluated.kind, f"evaluate: {evaluated.detail}")
    trained = _train(run, 12)
    if trained.kind == "silent":
        same = _trained(run) == _trained(_whole() / "further")
        trained = Outcome("fine" if same else "differs", "further training")
    return Outcome(trained.kind, f"evaluate: {evaluated.detail}; train: {trained.detail}")


def _as_the_verb(name: str, way: str, folder: Path) -> Outcome:
    """Whether `evaluate` ends in this process as in one of its own."""
    shutil.copytree(_whole() / "run", folder / "run")
    _damage(folder / "run" / name, WAYS[way])
    verb = ["evaluate", str(folder / "run"), "--json"]
    here, there = run_verb_here(verb).kind, run_verb(verb).kind
    return Outcome("fine" if here == there else "differs", f"{here} here, {there} by the verb")


def _evaluate(run: Path) -> Outcome:
    """Evaluates a damaged run: the same values, or others of a step before it, if the damage is said."""
    code, out, said = call_here(["evaluate", str(run), "--json"])
    if code:
        return judge(code, said)
    if out == _values():
        return Outcome("fine", "the same values")
    return Outcome("clear" if "is damaged" in said else "differs", said[-300:])


@functools.cache
def _values() -> str:
    return call_here(["evaluate", str(_whole() / "run"), "--json"])[1]


def _trained(run: Path) -> str:
    """Returns what a run's last four steps left."""
    events = [(e["step"], e["values"]) for e in read_events(run) if e["event"] == "train" and e["step"] > 8]
    return json.dumps(events)


# --- a study ---


def _try_study(name: str, way: Callable[[bytes], bytes] | None, folder: Path) -> Outcome:
    """Reports a study: the same table and laws, or an error or a line that says what was damaged."""
    study = folder / "study"
    shutil.copytree(_whole() / "study", study)
    _damage(study / name, way)
    code, _, said = call_here(["report", str(study)], seconds=120)
    if code:
        return judge(code, said)
    if _reported(study) == _reported(_whole() / "study"):
        return Outcome("fine", "the same report")
    return Outcome("clear" if Path(name).name in said else "differs", said[-300:])


def _reported(study: Path) -> list[str]:
    return [(study / name).read_text() for name in REPORTED]
