"""`scaling import` and `scaling export`: run folders from and to other libraries' checkpoints."""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling import data, models, objectives
from scaling.convert import FORMATS, Format, files, naming, preprocessing, rules
from scaling.convert.converter import Converter
from scaling.errors import UserError, one_line
from scaling.models.variants import side_lengths
from scaling.run import build, restore
from scaling.run import config as run_config
from scaling.run.options import Config
from scaling.training import import_weights

SHOWN = 12  # maximum number of faults of a file that an error lists


class Opened(NamedTuple):
    """A checkpoint that fits a config's model."""

    run: build.Run  # the run of the config, with the keys that the checkpoint decides
    converter: Converter[Any]
    model: Any  # the checkpoint's model: the run's, except for sizes that can be changed
    tensors: Mapping[str, np.ndarray]  # tensors by the names of the converter's table
    said: list[str]  # lines to report

    def read(self, source: Path, reinit: Iterable[str] = ()) -> dict[str, Any]:
        """Returns the variables {"params": ..., ...} for the checkpoint's own model.

        Raises:
            UserError: if tensors are missing, unexpected, of other shapes, or not finite.
        """
        variables, notes = _read(self.converter, self.model, self.run, self.tensors, source, reinit)
        self.said.extend(notes)
        return variables


def open_checkpoint(name: str, source: Path, cfg: Config, kept: Collection[str] = ()) -> Opened:
    """Reads a checkpoint in the format `name`, and checks that the config agrees with its files.

    The tensors themselves are checked by `Opened.read`. The run takes over what a checkpoint decides: the
    preprocessing of its images, and the model's fields in `ConfigFile.sets`. Dotted keys in `kept` were given
    by hand and stay as they are.

    Raises:
        UserError: if files cannot be read, or belong to another model.
    """
    _, converter = _converter(name, cfg.model.name)
    notes: list[str] = []
    stated = files.read_config(source) if converter.config_file else None
    fields = _stated_fields(converter, cfg.model.name, stated, source)
    tensors: Mapping[str, np.ndarray] = files.read_tensors(source, notes)
    run = _build(cfg)
    new, reasons = _decided_keys(converter, run, fields, source, kept)
    notes += reasons
    if converter.config_file and stated is not None:
        notes += converter.config_file.notes(stated)
    run = _build(run_config.changed(cfg, new)) if new else run
    tensors, renames = naming.known(converter, converter.table(run.model), tensors)
    model = _checkpoint_model(converter, run, tensors, stated, fields, source)
    return Opened(run, converter, model, tensors, [one_line(note) for note in notes + renames])


def import_run(
    name: str,
    source: Path,
    cfg: Config,
    out: Path,
    reinit: Collection[str] = (),
    kept: Collection[str] = (),
) -> list[str]:
    """Creates the run folder `out` from a checkpoint in the format `name`: a run of `cfg` at step 0.

    Parameters under a path of `reinit` ("head") are not read but re-initialised; `kept` is as for
    `open_checkpoint`. Returns the lines to report: names that were changed, keys of the config that were set,
    position tables that were resized, parameters that are re-initialised.

    Raises:
        UserError: if a file cannot be read or does not fit the config, or `out` exists.
    """
    if out.exists() and not import_weights.was_cut_off(out):
        raise UserError(f"out={out}: exists; choose another folder, nothing is written over")
    files.require_unchanged(source)
    opened = open_checkpoint(name, source, cfg, kept)
    variables, run, notes = opened.read(source, reinit), opened.run, opened.said
    if opened.model != run.model:
        family = models.family(cfg.model.name)
        variables, resized = family.resized(variables, opened.model, run.model)
        notes += resized
    imported = {"format": name, "source": str(source), "set": run_config.differences(cfg, run.config)}
    import_weights.create_run_from_weights(run, variables, out, str(source), imported)
    return notes


def export_run(name: str, folder: Path, out: Path) -> list[str]:
    """Writes a run's weights (the first average, where it keeps one) as a folder in the format `name`.

    Returns the lines to report: the parts of the run's preprocessing that the folder cannot hold.

    Raises:
        UserError: if the run has no form in this format, or `out` exists.
    """
    trained = restore.restore_run(folder)
    run = trained.run
    checkpoint_format, converter = _converter(name, run.config.model.name)
    converter.check_export(run.model)
    weights = jax.device_get({"params": trained.weights["params"], **trained.weights["collections"]})
    inputs = _inputs(run)
    tensors = rules.save(converter.table(run.model), weights) | converter.buffers(run.model, inputs)
    others: dict[str, Any] = {}
    notes: list[str] = []
    if converter.config_file:
        others["config.json"] = converter.config_file.config(run.model, inputs)
    if converter.preprocessing:
        others[preprocessing.FILE], notes = preprocessing.described(run.config, inputs["x"].shape[1:])
    written = {file: (json.dumps(value, indent=2) + "\n").encode() for file, value in others.items()}
    files.write_folder(out, checkpoint_format.file, tensors, written)
    return notes


def _inputs(run: build.Run) -> Mapping[str, Any]:
    """Returns the model's arguments as formats ask for them; of a model that is trained, its images alone."""
    if not objectives.trains(run.config.objective.name):
        return run.batch(1)
    return {"x": jax.ShapeDtypeStruct((1, *run.image_shape), np.float32)}


def _converter(name: str, family: str) -> tuple[Format, Converter[Any]]:
    if name not in FORMATS:
        raise UserError(f"format={name!r}: must be one of {', '.join(FORMATS)}")
    families = FORMATS[name].families
    if family not in families:
        raise UserError(f"format={name!r}: has no {family}; it has {', '.join(families)}")
    return FORMATS[name], families[family]


def _build(cfg: Config) -> build.Run:
    """Builds the run; where its data are not at hand, for the data that the variant is designed for."""
    try:
        info = data.info(cfg.data) if objectives.trains(cfg.objective.name) else None
    except UserError:
        if cfg.data.name == "latents":  # the variant knows neither their scale nor their decoder
            raise
        info = build.made_for(cfg)
    return build.build(cfg, info=info)


def _stating_file(source: Path, stated: Any) -> Path:
    return source if stated is None else source / "config.json"


def _stated_fields(
    converter: Converter[Any], family: str, stated: Mapping[str, Any] | None, source: Path
) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model; nothing where there is none.

    Raises:
        UserError: if the file belongs to another model.
    """
    if stated is None or converter.config_file is None:
        return {}
    try:
        return converter.config_file.fields(stated)
    except UserError as e:
        raise UserError(f"{source / 'config.json'}: {e}") from None
    except Exception as e:  # a file of another family lacks keys that `fields` reads, or has other types
        raise _other_family_error(family, source / "config.json", e) from None


def _other_family_error(family: str, where: Path, e: Exception) -> UserError:
    why = f"{type(e).__name__}: {files.reason(e)}"
    return UserError(f"{where}: is not of the family {family} ({why}); give one that is")


def _decided_keys(
    converter: Converter[Any],
    run: build.Run,
    fields: Mapping[str, Any],
    source: Path,
    kept: Collection[str],
) -> tuple[dict[str, Any], list[str]]:
    """Returns the config keys that the checkpoint decides, with their values, and the lines to report."""
    cfg = run.config
    new: dict[str, Any] = {}
    notes: list[str] = []
    for field in _sets(converter):
        default = getattr(models.make(cfg.model.name, cfg.model.variant), field)
        configured = cfg.model.options.get(field)
        if field in fields and configured is None and fields[field] != default:
            new[f"model.{field}"] = fields[field]
            notes.append(f"model.{field}={fields[field]}, by config.json")
        elif field in fields and configured is not None and fields[field] != configured:
            notes.append(f"model.{field}={configured} as given, where config.json has {fields[field]}")
    if converter.preprocessing:
        seen = preprocessing.read(source, cfg.model.name) or converter.preprocessing(run.model)
        changes, reasons = preprocessing.changes(seen, cfg, _inputs(run)["x"].shape[1:], kept)
        new, notes = new | changes, notes + reasons
    return new, notes


def _sets(converter: Converter[Any]) -> tuple[str, ...]:
    return converter.config_file.sets if converter.config_file else ()


def _checkpoint_model(
    converter: Converter[Any],
    run: build.Run,
    tensors: Mapping[str, np.ndarray],
    stated: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
    source: Path,
) -> Any:
    """Returns the checkpoint's model: the run's, except for what can be resized.

    Raises:
        UserError: if the folder's config.json belongs to another model.
    """
    try:
        model = converter.source(run.model, tensors, stated)
        if converter.config_file and stated is not None:
            converter.config_file.check_inputs(stated, _inputs(run))
        _require_form(converter, model, run)
    except UserError as e:
        raise UserError(f"{_stating_file(source, stated)}: {e}") from None
    except Exception as e:  # a config.json of another family, or tensors of shapes that no model has
        raise _other_family_error(run.config.model.name, _stating_file(source, stated), e) from None
    for field, value in fields.items():
        own = getattr(model, field)
        numbers = isinstance(value, float) and own is not None
        same = math.isclose(value, own) if numbers else value == own
        if not same and field not in _sets(converter):
            raise UserError(
                f"{source}/config.json: is of a model with {field}={value!r}, and model.{field}={own!r}; "
                f"give --config.model.{field}={value!r}"
            )
    return model


def _require_form(converter: Converter[Any], model: Any, run: build.Run) -> None:
    """Checks that the model could be exported: that the format has it, and computes the same.

    Raises:
        UserError: if an export would raise it.
    """
    inputs, fields = dict(_inputs(run)), {field.name for field in dataclasses.fields(model)}
    if "x" in inputs and "resolution" in fields:
        x = inputs["x"]
        frames = x.shape[1:-3] and (model.frames if "frames" in fields else x.shape[1],)
        shape = (1, *frames, *side_lengths(model.resolution), x.shape[-1])
        inputs["x"] = jax.ShapeDtypeStruct(shape, np.float32)
    if converter.config_file:
        converter.config_file.config(model, inputs)
    converter.buffers(model, inputs)


def _read(
    converter: Converter[Any],
    model: Any,
    run: build.Run,
    tensors: Mapping[str, np.ndarray],
    source: Path,
    reinit: Iterable[str],
) -> tuple[dict[str, Any], list[str]]:
    """Returns the variables that the tensors hold, all checked, without the re-initialised ones."""
    table, ignored = converter.table(model), list(converter.ignored)
    notes = []
    for parent in reinit:
        skipped = [r for r in table if any(f"{path}/".startswith(f"params/{parent}/") for path in r.paths)]
        if not skipped:
            raise UserError(f"reinit={parent!r}: no parameter of {run.config.model.name} has this path")
        table = [r for r in table if r not in skipped]
        ignored += [f"^{name}$" for r in skipped for name in (*rules.names(r), *r.copies)]
        notes.append(f"{parent}: starts afresh")
    faults = rules.faults(table, tensors, _variable_shapes(model, run, source), ignored)
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        head = all(re.match(r"missing (classifier|head|fc)\b", fault) for fault in faults)
        hint = "; the file has no head: give --reinit=head for a fresh one" if head else ""
        raise UserError(f"{source}: does not fit the config: {'; '.join(faults[:SHOWN])}{more}{hint}")
    try:
        naming.require_finite(tensors)
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
    return rules.load(
        table, {n: t.astype(np.float32) for n, t in tensors.items() if t.dtype.kind in rules.FLOATS}
    ), notes


def _variable_shapes(model: Any, run: build.Run, source: Path) -> Any:
    """Returns the shapes of the variables of a checkpoint's model, a tree.

    Raises:
        UserError: if no model has the sizes in which it differs from the run's.
    """
    objective = dataclasses.replace(run.objective, model=model)  # type: ignore[type-var]
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in run.batch(1).items()}
    try:
        return jax.eval_shape(objective.init, jax.random.key(0), batch)
    except Exception as e:
        if model == run.model or isinstance(e, UserError):
            raise
        raise _other_family_error(run.config.model.name, source, e) from None
