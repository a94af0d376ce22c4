"""The only training loop: it steps, logs, saves and evaluates, until it is done or signalled to stop."""

import contextlib
import dataclasses
import math
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

import scaling
from scaling import data, objectives
from scaling.data import fingerprints
from scaling.errors import UserError
from scaling.evaluators.base import Evaluator, Measure, require_images
from scaling.files import write_json
from scaling.metrics.kinds import STANDARD_ERROR
from scaling.parallel import distributed, sharding
from scaling.processes import Stopped, stop_signals
from scaling.progress import Progress, say
from scaling.run import build, optimizer, state
from scaling.run.checkpoint import Checkpoints, Misfit
from scaling.run.cost import run_cost
from scaling.run.folder import RunFolder, read_description, read_events, read_status
from scaling.run.helpers import RunHelpers
from scaling.run.options import Config
from scaling.training import config, resuming
from scaling.training.evaluate import check_all, prepare_all
from scaling.training.tensorboard import TensorBoard
from scaling.training.warm_start import initial_state

Pending = tuple[int, dict[str, jax.Array]] | None  # a step's metrics, still on the device


class Interrupted(Exception):
    """The exception for a run that a signal stopped; its state is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stop:
    """A request to stop, by Ctrl-C, SIGTERM or SIGHUP: honoured between steps, and a second one at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other
            for signum in stop_signals():
                self._previous[signum] = signal.signal(signum, self._request)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise Stopped(signum)
        self.signum = signum

    def agreed(self) -> int:
        """Returns the signal that any process received, else 0: all processes stop at the same step."""
        if jax.process_count() == 1:
            return self.signum
        return int(np.max(multihost_utils.process_allgather(np.asarray(self.signum))))

    def check(self) -> None:
        """Ends the run if any process was signalled; evaluators call it between batches.

        Raises:
            Interrupted: if any was.
        """
        if signum := self.agreed():
            raise Interrupted(signum)


def train(cfg: Config, workdir: Path | str) -> dict[str, float]:
    """Trains to the end of `cfg.train.duration` in the run folder, and resumes a run that it holds.

    Returns the last value of every metric that was evaluated.

    Raises:
        UserError: for bad input, a diverged loss, a full disk; the run folder says why. For a folder that
            holds a run of another config, or whose checkpoint does not fit this one, nothing is written.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, with the state saved.
    """
    if not objectives.trains(cfg.objective.name):
        raise UserError(f"objective.name={cfg.objective.name!r}: has no loss to train by; name another")
    with RunFolder(workdir, writer=jax.process_index() == 0) as folder, Stop() as stop:
        resuming.require_imported(folder.path)
        saved = folder.saved()
        if saved is not None:  # else nothing is lost if the run is another one
            cfg = resuming.apply_imported(folder.path, cfg)
            resuming.require_same_config(folder.path, cfg)
        try:
            run = build.build(cfg)
            require_images(cfg.data, cfg.data.train_split, run.image_shape, "data.train_split")
            fingerprint = fingerprints.of_training(cfg.data)
            if saved is not None:
                resuming.require_same_tokens(folder.path, run)
                resuming.require_same_data(folder.path, cfg, fingerprint)
            run.batch_sharding()  # raises for a batch that the mesh does not divide
            optimizer.check_rules(cfg.optimizer, run.variable_shapes["params"])
            made = check_all(run)
            _train_needed(made)
            last = _fit(run, made, folder, stop, saved, fingerprint)
        except (Interrupted, KeyboardInterrupt) as e:
            folder.end("interrupted", str(e) or None)
            raise
        except BaseException as e:
            if isinstance(e, Misfit) and e.folder == folder.path.absolute():
                raise  # the folder holds another run, whose status stays
            with contextlib.suppress(UserError):  # the disk may be full: the first error is the one to report
                folder.end("failed", (str(e).strip() or type(e).__name__).splitlines()[0])
            raise
        folder.end("done")
        return last


def _train_needed(made: Mapping[str, Evaluator]) -> None:
    """Trains the classifiers that the evaluators measure with, unless they are trained."""
    for source, folder in (need for evaluator in made.values() for need in evaluator.needs()):
        if (read_status(folder) or {}).get("status") != "done":
            train(config.load(source), folder)


def write_config(
    folder: RunFolder,
    run: build.Run,
    imported: Mapping[str, Any] | None = None,
    helpers: RunHelpers | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json`: the config, versions, costs, data, helpers, and what was `imported`."""
    if not folder.writer:
        return
    if imported is None and folder.saved() is not None:
        imported = (read_description(folder.path) or {}).get("imported")
    model = run.model
    fields = {field.name for field in dataclasses.fields(model)}
    sizes = [name for name in ("depth", "width", "heads", "patch") if name in fields]
    shape: dict[str, Any] = {name: getattr(model, name) for name in sizes}
    description = {"config": run.config.raw, "version": scaling.__version__, "commit": _commit()}
    description |= {"cost": run_cost(run), "model": shape, "data": dataclasses.asdict(run.info)}
    description |= {"fingerprint": fingerprint} if fingerprint else {}
    description |= {"imported": imported} if imported else {}
    description |= {"helpers": helpers.description()} if helpers and helpers.description() else {}
    write_json(folder.path / "config.json", description)


def _commit() -> str | None:
    """Returns the git commit of the package's source, with "+" if files differ; None outside a checkout."""

    def git(*arguments: str) -> str:
        # Without a lock on the index, which would stay behind if a limit of this process ended git.
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _fit(
    run: build.Run,
    made: Mapping[str, Evaluator],
    folder: RunFolder,
    stop: Stop,
    saved: int | None,
    fingerprint: Mapping[str, Any],
) -> dict[str, float]:
    """Trains to the last step, from the newest checkpoint or, if no step was `saved`, a fresh state."""
    cfg, total = run.config, run.steps
    main = jax.process_index() == 0
    name = folder.path.name
    if main:
        say(f"{name}: {total} steps of {cfg.data.batch_size} examples")
    with (
        Checkpoints(
            folder.path / "checkpoints", cfg.checkpoint.keep, keep_at=run.kept_steps()
        ) as checkpoints,
        contextlib.ExitStack() as opened,
    ):
        restored = checkpoints.restore(state.abstract(run), saved)
        board = opened.enter_context(TensorBoard(folder.path / "tensorboard")) if main else None
        helpers = RunHelpers(run, None if saved is None else folder.path)
        measured = {name: evaluator for name, evaluator in made.items() if evaluator.in_training}
        measures = prepare_all(measured, run, folder.path, helpers, stop.check, board)
        write_config(folder, run, helpers=helpers, fingerprint=fingerprint)
        if restored:
            (current, start), message = restored, f"resumed at step {restored[1]}"
        else:
            current, start, message = initial_state(run)
        folder.open_metrics(start)
        folder.begin(start, total)
        with Progress(name, total, start=start, examples=cfg.data.batch_size, show=main) as progress:
            if message:
                progress.say(message)
            if jax.process_count() > 1:
                progress.say(distributed.LOST_NOTE)
            for line in sharding.sharding_notes(current.params, run.mesh):
                progress.say(line)
            due = {
                name: (measures[name], run.due(evaluator.every, f"evaluators.{name}.every"))
                for name, evaluator in measured.items()
            }
            loop = _Loop(run, due, helpers, folder, stop, checkpoints, progress, board, start)
            loop.train(current, start)
    return loop.last


class _Loop:
    """The loop and its bookkeeping: what is due at which step, and metrics that are read one step late."""

    def __init__(
        self,
        run: build.Run,
        evaluators: Mapping[str, tuple[Measure, Callable[[int], bool]]],
        helpers: RunHelpers,
        folder: RunFolder,
        stop: Stop,
        checkpoints: Checkpoints,
        progress: Progress,
        board: TensorBoard | None,
        start: int,
    ) -> None:
        self.run, self.evaluators, self.helpers = run, evaluators, helpers
        self.folder, self.stop = folder, stop
        self.checkpoints, self.progress, self.board = checkpoints, progress, board
        self.start, cfg = start, run.config
        due, kept = run.due(cfg.checkpoint.every, "checkpoint.every"), run.kept_steps()
        self.save_due = lambda step: due(step) or step in kept
        # Processes read the file at different times, so only events up to the restored step count.
        events = [e for e in read_events(folder.path) if e["event"] == "evaluate" and e["step"] <= start]
        self.evaluated = {(e["step"], e.get("evaluator")) for e in events}
        self.saving: int | None = None  # the step whose checkpoint is being written
        self.waited = 0.0  # seconds spent waiting for batches since the last line of metrics
        self.in_steps = 0.0  # seconds spent in steps since then: all but evaluation, saves and compilation
        self.steps_timed = 0  # steps in that time
        self.mark = time.perf_counter()  # the moment up to which time is accounted for
        self.last: dict[str, float] = {k: v for e in events for k, v in e.get("values", {}).items()}

    def train(self, current: state.State, start: int) -> None:
        cfg = self.run.config
        place = self.run.batch_sharding()
        with contextlib.closing(data.train_batches(cfg.data, cfg.train.seed, start, place)) as batches:
            self._train(current, start, batches)

    def _train(self, current: state.State, start: int, batches: Iterator[dict[str, jax.Array]]) -> None:
        run, total = self.run, self.run.steps
        step_fn, traced_hparams = state.make_step(run), state.traced_hparams(run)
        helpers = self.helpers.named()
        pending: Pending = None
        for step in range(start, total + 1):
            if self._due(step):
                self._read(pending)
                pending = None
            self.in_steps += self._lap()
            try:
                self._save_and_evaluate(current, step)
                self._stop_if_signalled(step)
                self._lap()
                batch = self._next(batches) if step < total else None
            except Interrupted:
                self._read(pending)
                self._save(current, step)
                raise
            if batch is not None:
                if step == start:
                    self.progress.say("compiling the step")
                current, metrics = step_fn(current, batch, traced_hparams, helpers)
                if step == start:
                    self._lap()  # the first call compiles
                self._read(pending)  # metrics of the step before, while the device is busy with this one
                pending = (step + 1, metrics)
                self._note_saved()

    def _next(self, batches: Iterator[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        start = time.perf_counter()
        try:
            batch = next(batches)
        except Exception:
            if self.stop.signum and jax.process_count() == 1:  # it has ended the loader's processes too
                raise Interrupted(self.stop.signum) from None
            raise
        self.waited += time.perf_counter() - start
        return batch

    def _read(self, pending: Pending) -> None:
        """Fetches a step's metrics, writes them if they are due, and checks that the run did not diverge.

        Raises:
            UserError: if the loss or the gradient is not finite.
        """
        step, metrics = pending or (0, {})
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        self.in_steps += self._lap()
        if pending is None:
            return
        if not all(math.isfinite(values[k]) for k in ("loss", "grad_norm")):
            raise self._diverged(f"step {step}: loss={values['loss']}, grad_norm={values['grad_norm']}")
        self.folder.step = step
        self.steps_timed += step > self.start + 1
        self.progress.update(step, f"loss {values['loss']:.4g}", last=step == self.run.steps)
        if step % self.run.config.train.log_every == 0 or step == self.run.steps:
            times = {"input_wait": round(self.waited, 4), "in_steps": round(self.in_steps, 4)}
            if self.steps_timed:
                examples = self.steps_timed * self.run.config.data.batch_size
                times["examples_per_second"] = round(examples / max(self.in_steps, 1e-9), 2)
                if self.board is not None:
                    self.board.write_scalars(step, {"examples_per_second": times["examples_per_second"]})
            self._event("train", step, values, **times)
            self.waited, self.in_steps, self.steps_timed = 0.0, 0.0, 0

    def _diverged(self, what: str) -> UserError:
        """Returns the error that says how to go on from what is saved."""
        steps = self.checkpoints.steps()
        advice = "lower optimizer.learning_rate or set optimizer.grad_clip_norm"
        if not steps:
            return UserError(f"{what}: the run diverged, and no step is saved; {advice}, in the same folder")
        return UserError(
            f"{what}: the run diverged; {advice}, and go on from step {steps[-1]} in another --workdir by "
            f"--config.train.continue_from={self.checkpoints.folder / str(steps[-1])}"
        )

    def _lap(self) -> float:
        """Returns the seconds since it was called last."""
        before, self.mark = self.mark, time.perf_counter()
        return self.mark - before

    def _event(self, event: str, step: int, values: dict[str, float], **more: Any) -> None:
        self.folder.event(event, step, step * self.run.config.data.batch_size, values, **more)
        if self.board is not None:
            self.board.write_scalars(step, values)

    def _stop_if_signalled(self, step: int) -> None:
        """Stops the run if it was signalled; several processes compare only every `log_every` steps."""
        if jax.process_count() == 1 or step % self.run.config.train.log_every == 0:
            self.stop.check()

    def _due(self, step: int) -> bool:
        return self.save_due(step) or any(due(step) for _, due in self.evaluators.values())

    def _save_and_evaluate(self, current: state.State, step: int) -> None:
        """Saves and evaluates if that is due at this step and was not done before."""
        if self.save_due(step):
            self._save(current, step)
        for name, (measure, due) in self.evaluators.items():
            if due(step) and (step, name) not in self.evaluated:
                values = measure(state.eval_weights(current), step)
                self.last |= values
                self._event("evaluate", step, values, evaluator=name)
                text = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if not k.endswith(STANDARD_ERROR))
                self.progress.say(f"step {step}: {text or name}")

    def _save(self, current: state.State, step: int) -> None:
        if step in self.checkpoints.steps():  # as where a run is resumed
            return
        if names := state.not_finite(self.run, current):
            raise self._diverged(f"step {step}: {names[0]} is not finite ({len(names)} arrays are not)")
        meta = {"step": step, "data_position": step, "config": self.run.config.raw}
        self.checkpoints.save(step, current, meta)
        self.saving = step

    def _note_saved(self) -> None:
        """Updates `status.json` as soon as a checkpoint is completely on disk."""
        if self.saving is not None and self.checkpoints.holds(self.saving):
            self.folder.beat()
            self.saving = None
