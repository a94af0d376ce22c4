"""`scaling import` and `scaling export`: run folders from and to other libraries' checkpoints."""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling import data, models
from scaling.convert import FORMATS, Format, files, naming, preprocessing, rules
from scaling.engine import adopt, build, changes, config, features
from scaling.errors import UserError
from scaling.models.variants import side_lengths

SHOWN = 12  # faults of a file that an error lists one by one


class Opened(NamedTuple):
    """A checkpoint that was found to be of a config's model, and what is worth saying of it."""

    built: build.Built  # of the config with the keys that the checkpoint decides
    family: ModuleType
    model: Any  # the checkpoint's own: the run's, but for sizes that can be changed
    tensors: Mapping[str, np.ndarray]  # by the names of the family's table
    said: list[str]

    def read(self, source: Path, reinit: Iterable[str] = ()) -> dict[str, Any]:
        """Returns the variables {"params": ..., ...} for the checkpoint's own model.

        Raises: UserError for tensors that are missing, unexpected, of other shapes, or not finite.
        """
        variables, said = _read(self.family, self.model, self.built, self.tensors, source, reinit)
        self.said.extend(said)
        return variables


def open_checkpoint(name: str, source: Path, cfg: config.Config, kept: Collection[str] = ()) -> Opened:
    """Reads a checkpoint in the format `name`, and holds the config to what its files say.

    The tensors themselves are checked by `Opened.read`. What a checkpoint decides becomes the run's: how its
    weights see images, and a model's fields in `SETS`. Dotted keys in `kept`, given by hand, stay so.

    Raises: UserError for files that cannot be read, and a model that is another.
    """
    chosen, family = _converter(name, cfg.model.name)
    said: list[str] = []
    stated = files.read_config(source) if chosen.config_file else None
    fields = _fields(family, stated, source)
    tensors: Mapping[str, np.ndarray] = files.read_tensors(source, said)
    built = _build(cfg)
    new, why = _settled(family, built, fields, source, kept)
    said += why + (family.notes(stated) if stated is not None and hasattr(family, "notes") else [])
    built = _build(changes.changed(cfg, new)) if new else built
    tensors, renamed = naming.known(family, family.table(built.model), tensors)
    model = _source(family, built, tensors, stated, fields, source)
    return Opened(built, family, model, tensors, said + renamed)


def import_run(
    name: str,
    source: Path,
    cfg: config.Config,
    out: Path,
    reinit: Collection[str] = (),
    kept: Collection[str] = (),
) -> list[str]:
    """Makes the run folder `out` of a checkpoint in the format `name`: a run of `cfg` at step 0.

    Parameters under a path of `reinit` ("head") are not read and start afresh; `kept` is as for
    `open_checkpoint`. Returns what is worth saying: names that were changed, keys of the config that were
    set, position tables that were resized, parameters that start afresh.

    Raises: UserError for a file that cannot be read or does not fit the config, or an `out` that exists.
    """
    if out.exists():
        raise UserError(f"out={out}: exists; choose another folder, nothing is written over")
    opened = open_checkpoint(name, source, cfg, kept)
    variables, built, said = opened.read(source, reinit), opened.built, opened.said
    if opened.model != built.model:
        module = models.module(cfg.model.name)
        variables, resized = module.resized(variables, opened.model, built.model)
        said += resized
    imported = {"format": name, "source": str(source), "set": changes.differences(cfg, built.config)}
    adopt.adopt(built, variables, out, str(source), imported)
    return said


def export_run(name: str, folder: Path, out: Path) -> list[str]:
    """Writes a run's weights (the first average, where it keeps one) as a folder in the format `name`.

    Returns what is worth saying: what of the run's preprocessing the folder cannot hold.

    Raises: UserError for a run that has no form in this format, or an `out` that exists.
    """
    trained = features.restore(folder)
    built = trained.built
    chosen, family = _converter(name, built.config.model.name)
    if hasattr(family, "check_export"):
        family.check_export(built.model)
    weights = jax.device_get({"params": trained.weights["params"], **trained.weights["collections"]})
    tensors = rules.save(family.table(built.model), weights)
    inputs = _inputs(built)
    if hasattr(family, "buffers"):
        tensors |= family.buffers(built.model, inputs)
    others: dict[str, Any] = {}
    said: list[str] = []
    if chosen.config_file:
        others["config.json"] = family.config(built.model, inputs)
    if hasattr(family, "preprocessing"):
        described, said = preprocessing.described(built.config, inputs["x"].shape[1:])
        others[preprocessing.FILE] = described
    written = {file: (json.dumps(value, indent=2) + "\n").encode() for file, value in others.items()}
    files.write_folder(out, chosen.file, tensors, written)
    return said


def _inputs(built: build.Built) -> Mapping[str, Any]:
    """The model's arguments, or of a model that is trained its images alone, as formats ask for them."""
    if not built.config.trains:
        return built.batch(1)
    return {"x": jax.ShapeDtypeStruct((1, *built.image_shape), np.float32)}


def _converter(name: str, family: str) -> tuple[Format, ModuleType]:
    if name not in FORMATS:
        raise UserError(f"format={name!r}: must be one of {', '.join(FORMATS)}")
    families = FORMATS[name].families
    if family not in families:
        raise UserError(f"format={name!r}: has no {family}; it has {', '.join(families)}")
    return FORMATS[name], families[family]


def _build(cfg: config.Config) -> build.Built:
    """The run; where its data are not at hand, for what the variant is made for."""
    try:
        info = data.info(cfg.data) if cfg.trains else None
    except UserError:
        if cfg.data.name == "latents":  # of which the variant knows neither the scale nor the decoder
            raise
        info = build.made_for(cfg)
    return build.build(cfg, info=info)


def _where(source: Path, stated: Any) -> Path:
    return source if stated is None else source / "config.json"


def _fields(family: ModuleType, stated: Mapping[str, Any] | None, source: Path) -> dict[str, Any]:
    """Returns what a folder's config.json says of the model; nothing where there is none.

    Raises: UserError for one that is of another model.
    """
    if stated is None:
        return {}
    try:
        return dict(family.fields(stated))
    except UserError as e:
        raise UserError(f"{source / 'config.json'}: {e}") from None
    except Exception as e:  # one of another family lacks what is asked for, or has it otherwise
        raise _not_of(family, source / "config.json", e) from None


def _not_of(family: ModuleType, where: Path, e: Exception) -> UserError:
    wanted = family.__name__.split(".")[-1]
    return UserError(f"{where}: is not of the family {wanted} ({type(e).__name__}: {e}); give one that is")


def _settled(
    family: ModuleType, built: build.Built, fields: Mapping[str, Any], source: Path, kept: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """The keys of the config that the checkpoint decides, and what is to be said of it."""
    cfg = built.config
    new: dict[str, Any] = {}
    said: list[str] = []
    for field in getattr(family, "SETS", ()):
        default = getattr(models.make(cfg.model.name, cfg.model.variant), field)
        mine = cfg.model.options.get(field)
        if field in fields and mine is None and fields[field] != default:
            new[f"model.{field}"] = fields[field]
            said.append(f"model.{field}={fields[field]}, by config.json")
        elif field in fields and mine is not None and fields[field] != mine:
            said.append(f"model.{field}={mine} as given, where config.json has {fields[field]}")
    if hasattr(family, "preprocessing"):
        seen = preprocessing.read(source, cfg.model.name) or family.preprocessing(built.model)
        changes, why = preprocessing.changes(seen, cfg, _inputs(built)["x"].shape[1:], kept)
        new, said = new | changes, said + why
    return new, said


def _source(
    family: ModuleType,
    built: build.Built,
    tensors: Mapping[str, np.ndarray],
    stated: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
    source: Path,
) -> Any:
    """The model that a checkpoint is of: ours, but for what can be resized.

    Raises: UserError where the folder's config.json is of another model.
    """
    try:
        found = built.model
        if hasattr(family, "source"):
            found = family.source(built.model, tensors, stated)
        if stated is not None and hasattr(family, "check_inputs"):
            family.check_inputs(stated, _inputs(built))
        _require_form(family, found, built)
    except UserError as e:
        raise UserError(f"{_where(source, stated)}: {e}") from None
    except Exception as e:  # a config.json of another family, or tensors of shapes that none has
        raise _not_of(family, _where(source, stated), e) from None
    for field, value in fields.items():
        ours = getattr(found, field)
        numbers = isinstance(value, float) and ours is not None
        same = math.isclose(value, ours) if numbers else value == ours
        if not same and field not in getattr(family, "SETS", ()):
            raise UserError(
                f"{source}/config.json: is of a model with {field}={value!r}, and model.{field}={ours!r}; "
                f"give --config.model.{field}={value!r}"
            )
    return found


def _require_form(family: ModuleType, model: Any, built: build.Built) -> None:
    """Raises UserError where an export would: the format has no such model, or has it otherwise."""
    inputs = dict(_inputs(built))
    if "x" in inputs and hasattr(model, "resolution"):
        frames = inputs["x"].shape[1:-3] and (getattr(model, "frames", inputs["x"].shape[1]),)
        shape = (1, *frames, *side_lengths(model.resolution), inputs["x"].shape[-1])
        inputs["x"] = jax.ShapeDtypeStruct(shape, np.float32)
    for name in ("config", "buffers"):
        if hasattr(family, name):
            getattr(family, name)(model, inputs)


def _read(
    family: ModuleType,
    model: Any,
    built: build.Built,
    tensors: Mapping[str, np.ndarray],
    source: Path,
    reinit: Iterable[str],
) -> tuple[dict[str, Any], list[str]]:
    """The variables that the tensors hold, all checked, without those that start afresh."""
    table = family.table(model)
    ignored = list(getattr(family, "IGNORED", ()))
    said = []
    for path in reinit:
        left = [r for r in table if any(f"{ours}/".startswith(f"params/{path}/") for ours in r.ours)]
        if not left:
            raise UserError(f"reinit={path!r}: no parameter of {built.config.model.name} has this path")
        table = [r for r in table if r not in left]
        ignored += [f"^{name}$" for r in left for name in (*rules.names(r), *r.copies)]
        said.append(f"{path}: starts afresh")
    one = dataclasses.replace(built.task, model=model)  # type: ignore[type-var]
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in built.batch(1).items()}
    shapes = jax.eval_shape(one.init, jax.random.key(0), batch)
    faults = rules.faults(table, tensors, shapes, ignored)
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
    ), said
