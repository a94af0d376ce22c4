"""`scaling import` and `scaling export`: run folders from and to other libraries' checkpoints."""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from scaling import data, models
from scaling.convert import FORMATS, Format, files, rules
from scaling.engine import adopt, build, config, features
from scaling.errors import UserError

SHOWN = 12  # faults of a file that an error lists one by one


def import_run(
    name: str, source: Path, cfg: config.Config, out: Path, reinit: Collection[str] = ()
) -> list[str]:
    """Makes the run folder `out` of a checkpoint in the format `name`: a run of `cfg` at step 0.

    Parameters under a path of `reinit` ("head") are not read and start afresh. Returns what is worth saying:
    position tables that were resized, parameters that start afresh.

    Raises: UserError for a file that cannot be read or does not fit the config, or an `out` that exists.
    """
    if out.exists():
        raise UserError(f"out={out}: exists; choose another folder, nothing is written over")
    chosen, family = _converter(name, cfg.model.name)
    built = _build(cfg)
    stated = files.read_config(source) if chosen.config_file else None
    tensors = _named(family, files.read_tensors(source))
    model = _source(family, built.model, tensors, stated, source)
    variables, said = _read(family, model, built, tensors, source, reinit)
    if model != built.model:
        module = models.module(cfg.model.name)
        variables, resized = module.resized(variables, model, built.model)
        said += resized
    adopt.adopt(built, variables, out, str(source))
    return said


def export_run(name: str, folder: Path, out: Path) -> None:
    """Writes a run's weights (the first average, where it keeps one) as a folder in the format `name`.

    Raises: UserError for a run that has no form in this format, or an `out` that exists.
    """
    trained = features.restore(folder)
    built = trained.built
    chosen, family = _converter(name, built.config.model.name)
    weights = jax.device_get({"params": trained.weights["params"], **trained.weights["collections"]})
    tensors = rules.save(family.table(built.model), weights)
    image = {"x": jax.ShapeDtypeStruct((1, *built.image_shape), np.float32)}
    inputs = image if built.config.trains else built.batch(1)
    if hasattr(family, "buffers"):
        tensors |= family.buffers(built.model, inputs)
    others = {}
    if chosen.config_file:
        described = json.dumps(family.config(built.model, inputs), indent=2) + "\n"
        others["config.json"] = described.encode()
    files.write_folder(out, chosen.file, tensors, others)


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


def _named(family: ModuleType, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by the names that the library gives them today."""
    for pattern, name in getattr(family, "RENAMED", ()):
        tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
    return tensors


def _source(
    family: ModuleType,
    model: Any,
    tensors: Mapping[str, np.ndarray],
    stated: Mapping[str, Any] | None,
    source: Path,
) -> Any:
    """The model that a checkpoint is of: ours, but for what can be resized.

    Raises: UserError where the folder's config.json is of another model.
    """
    try:
        found = family.source(model, tensors, stated) if hasattr(family, "source") else model
        fields = {} if stated is None else family.fields(stated)
    except UserError:
        raise
    except Exception as e:  # a config.json of another family lacks what is asked for, or has it otherwise
        where = source if stated is None else source / "config.json"
        wanted = family.__name__.split(".")[-1]
        raise UserError(
            f"{where}: is not of the family {wanted} ({type(e).__name__}: {e}); give one that is"
        ) from None
    for field, value in fields.items():
        ours = getattr(found, field)
        numbers = isinstance(value, float) and ours is not None
        same = math.isclose(value, ours) if numbers else value == ours
        if not same:
            raise UserError(
                f"{source}/config.json: is of a model with {field}={value!r}, and model.{field}={ours!r}; "
                f"give --config.model.{field}={value!r}"
            )
    return found


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
        raise UserError(f"{source}: does not fit the config: {'; '.join(faults[:SHOWN])}{more}")
    return rules.load(
        table, {n: t.astype(np.float32) for n, t in tensors.items() if t.dtype.kind in rules.FLOATS}
    ), said
