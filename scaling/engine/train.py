"""The only training loop: step, log, checkpoint, evaluate, until done or told to stop."""

import contextlib
import dataclasses
import math
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

import scaling
from scaling import data
from scaling.engine import build, changes, config, processes, sharding, state
from scaling.engine.checkpoint import Checkpoints, Misfit
from scaling.engine.config import Config
from scaling.engine.evaluator import measured, require_tokenizer
from scaling.engine.logging import Progress, metric_writer
from scaling.engine.runfolder import RunFolder, read_events
from scaling.engine.start import begin
from scaling.errors import UserError
from scaling.files import read_json, write_json
from scaling.typed import typed

# Keys that may differ when a run is resumed: they change what is measured or where, not what is learned.
FREE = ("mesh.", "evaluate.", "sampling.", "checkpoint.", "train.log_every", "data.threads", "data.workers",
        "data.prefetch", "model.remat", "model.unroll")  # fmt: skip


Pending = tuple[int, dict[str, jax.Array]] | None  # a step's metrics, still on the device


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stop:
    """SIGTERM and Ctrl-C as a request that the loop honours between steps; a second one is immediate."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._before[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum

    def agreed(self) -> int:
        """The signal that any process received: all must leave at the same step."""
        if jax.process_count() == 1:
            return self.signum
        return int(np.max(multihost_utils.process_allgather(np.asarray(self.signum))))


def run(cfg: Config, workdir: Path | str) -> dict[str, float]:
    """Trains to the end of `cfg.train.duration` in the run folder, resuming what is there.

    Returns the last value of every metric that was evaluated.

    Raises:
        UserError: for bad input, a diverged loss, a full disk; the run folder says why. For a folder that
            holds a run of another config, or whose checkpoint does not fit this one, nothing is written.
        Interrupted: after SIGTERM or Ctrl-C, with the state saved.
    """
    if not cfg.trains:
        raise UserError(f"objective.name={cfg.objective.name!r}: has no loss to train by; name another")
    with RunFolder(workdir, writer=jax.process_index() == 0) as folder, Stop() as stop:
        cfg = _as_imported(folder.path, cfg)
        _same_config(folder.path, cfg)
        saved = folder.saved()
        try:
            built = build.build(cfg)
            _same_tokens(folder.path, built)
            _prepare(built)
            last = _fit(built, folder, stop, saved)
        except (Interrupted, KeyboardInterrupt) as e:
            folder.end("interrupted", str(e) or None)
            raise
        except BaseException as e:
            if isinstance(e, Misfit) and e.folder == folder.path.absolute():
                raise  # the folder holds another run, whose status stays
            with contextlib.suppress(UserError):  # of a full disk, say: the first error is the one to report
                folder.end("failed", (str(e).strip() or type(e).__name__).splitlines()[0])
            raise
        folder.end("done")
        return last


def _as_imported(path: Path, cfg: Config) -> Config:
    """Returns the config with what a checkpoint decided when the folder was imported (`convert.transfer`)."""
    there = read_json(path / "config.json") or {}
    now, new = config.flat(cfg.raw), {}
    for key, (before, after) in there.get("imported", {}).get("set", {}).items():
        if now.get(key) == config.tupled(before):
            new[key] = after
    return changes.changed(cfg, new) if new else cfg


def _same_config(path: Path, cfg: Config) -> None:
    """Raises UserError if the folder holds a run of another config."""
    there = read_json(path / "config.json")
    if there is None:
        return
    old, new = config.flat(changes.stored(there)), config.flat(cfg.raw)
    free = FREE if cfg.optimizer.schedule != "constant" else (*FREE, "train.duration")
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(free):
            raise UserError(
                f"workdir={path}: holds a run with {key}={old.get(key)!r}, not {new.get(key)!r}; "
                "choose another folder, or give the same value to resume it"
            )


def _same_tokens(path: Path, built: build.Built) -> None:
    """Raises UserError if the folder's run has learned other tokens than the captions would become now."""
    there = (read_json(path / "config.json") or {}).get("data") or {}
    if there.get("text") and built.info.text is not None:
        text = typed(data.TextInfo, there["text"], "data.text")
        require_tokenizer(dataclasses.replace(built, info=dataclasses.replace(built.info, text=text)))


def _prepare(built: build.Built) -> None:
    """Trains the classifiers that evaluators measure with, where they are not there yet, and checks all."""
    built.place()  # raises UserError for a batch that the mesh does not divide
    for name, evaluator in built.config.evaluate.items():
        for source, folder in evaluator.needs():
            done = (read_json(Path(folder) / "status.json") or {}).get("status") == "done"
            if not done:
                run(config.load(source), folder)
        evaluator.check(name, built)


def write_config(folder: RunFolder, built: build.Built, imported: Mapping[str, Any] | None = None) -> None:
    """Writes `config.json`: the config, the versions, what the run costs, and what it was `imported` from."""
    if not folder.writer:
        return
    imported = imported or (read_json(folder.path / "config.json") or {}).get("imported")
    model = built.model
    shape = {k: getattr(model, k) for k in ("depth", "width", "heads", "patch") if hasattr(model, k)}
    described = {"config": built.config.raw, "version": scaling.__version__, "commit": _commit()}
    described |= {"cost": build.cost(built), "model": shape, "data": dataclasses.asdict(built.info)}
    described |= {"imported": imported} if imported else {}
    write_json(folder.path / "config.json", described)


def _commit() -> str | None:
    """The git commit of the package's source, with "+" if files differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _fit(built: build.Built, folder: RunFolder, stop: Stop, saved: int | None) -> dict[str, float]:
    """Trains from the newest checkpoint to the last step, or from a fresh state if none was ever `saved`."""
    cfg, total = built.config, built.steps
    main = jax.process_index() == 0
    name = folder.path.name
    with Checkpoints(folder.path / "checkpoints", cfg.checkpoint.keep) as checkpoints:
        restored = checkpoints.restore(state.abstract(built), saved)
        write_config(folder, built)
        if restored:
            (current, start), said = restored, f"resumed at step {restored[1]}"
        else:
            start, (current, said) = 0, begin(built)
        folder.open_metrics(start)
        folder.begin(start, total)
        writer = metric_writer(folder.path / "tensorboard") if main else None
        with Progress(name, start, total, cfg.data.batch_size, show=main) as progress:
            if said:
                progress.say(said)
            if jax.process_count() > 1:
                progress.say(processes.SAID)
            for line in sharding.uncut(current.params, built.mesh):
                progress.say(line)
            loop = _Loop(built, folder, stop, checkpoints, progress, writer, start)
            loop.run(current, start)
        if writer is not None:
            writer.close()
    return loop.last


class _Loop:
    """The loop's bookkeeping: what is due at which step, and metrics read one step late."""

    def __init__(
        self,
        built: build.Built,
        folder: RunFolder,
        stop: Stop,
        checkpoints: Checkpoints,
        progress: Progress,
        writer: Any,
        start: int,
    ) -> None:
        self.built, self.folder, self.stop = built, folder, stop
        self.checkpoints, self.progress, self.writer = checkpoints, progress, writer
        cfg = built.config
        self.save_due = built.due(cfg.checkpoint.every, "checkpoint.every")
        self.evaluators = {
            name: (e, built.due(e.every, f"evaluate.{name}.every")) for name, e in cfg.evaluate.items()
        }
        # Processes read the file at different times: only what the restored step knew counts.
        events = [e for e in read_events(folder.path) if e["event"] == "evaluate" and e["step"] <= start]
        self.evaluated = {(e["step"], e["evaluator"]) for e in events}
        self.saving: int | None = None  # the step whose checkpoint is being written
        self.waited = 0.0  # seconds, for batches, since the last line of metrics
        self.last: dict[str, float] = {k: v for e in events for k, v in e["values"].items()}

    def run(self, current: state.State, start: int) -> None:
        built, total = self.built, self.built.steps
        cfg = built.config
        batches = data.train_batches(cfg.data, cfg.train.seed, start, built.place())
        step_fn, scalars = state.make_step(built), state.scalars(built)
        pending: Pending = None
        for step in range(start, total + 1):
            if self._due(step):
                self._read(pending)
                pending = None
            try:
                self._boundary(current, step)
                self._leave_if_told(step)
            except Interrupted:
                self._read(pending)
                self._save(current, step)
                raise
            if step < total:
                current, metrics = step_fn(current, self._next(batches), scalars)
                self._read(pending)  # of the step before: the device is already busy with this one
                pending = (step + 1, metrics)
                self._note_saved()

    def _next(self, batches: Iterator[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def _read(self, pending: Pending) -> None:
        """Fetches a step's metrics, stops the run if it diverged, and logs what is due."""
        if pending is None:
            return
        step, metrics = pending
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if not all(math.isfinite(values[k]) for k in ("loss", "grad_norm")):
            kept = self.checkpoints.steps()
            where = f"step {kept[-1]} is kept" if kept else "no checkpoint was due before it"
            raise UserError(
                f"step {step}: loss={values['loss']}, grad_norm={values['grad_norm']}: the run diverged "
                f"({where}); lower optimizer.learning_rate or set optimizer.clip"
            )
        self.folder.step = step
        self.progress.update(step, values["loss"])
        if step % self.built.config.train.log_every == 0 or step == self.built.steps:
            self._event("train", step, values, input_wait=round(self.waited, 4))
            self.waited = 0.0

    def _event(self, event: str, step: int, values: dict[str, float], **more: Any) -> None:
        self.folder.event(event, step, step * self.built.config.data.batch_size, values, **more)
        if self.writer is not None:
            self.writer.write_scalars(step, values)

    def _leave_if_told(self, step: int) -> None:
        """Several processes ask one another only every `log_every` steps."""
        if jax.process_count() == 1 or step % self.built.config.train.log_every == 0:
            self._pulse()

    def _pulse(self) -> None:
        """Raises Interrupted if any process was told to stop; evaluators call it between batches."""
        signum = self.stop.agreed()
        if signum:
            raise Interrupted(signum)

    def _due(self, step: int) -> bool:
        return self.save_due(step) or any(due(step) for _, due in self.evaluators.values())

    def _boundary(self, current: state.State, step: int) -> None:
        """Saves and evaluates what is due at this step and not done before."""
        if self.save_due(step):
            self._save(current, step)
        for name, (evaluator, due) in self.evaluators.items():
            if due(step) and (step, name) not in self.evaluated:
                weights = state.inference(current)
                folder = self.folder.path
                values = measured(name, evaluator, self.built, weights, folder, step, self._pulse)
                self.last |= values
                self._event("evaluate", step, values, evaluator=name)
                shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
                self.progress.say(f"step {step}: {shown or name}")

    def _save(self, current: state.State, step: int) -> None:
        meta = {"step": step, "data_position": step, "config": self.built.config.raw}
        self.checkpoints.save(step, current, meta)
        self.saving = step

    def _note_saved(self) -> None:
        """Writes to `status.json` that a checkpoint is whole, as soon as it is."""
        if self.saving is not None and self.checkpoints.holds(self.saving):
            self.folder.beat()
            self.saving = None
