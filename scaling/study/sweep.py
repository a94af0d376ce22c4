"""A study and what it varies: lists of overrides, made by `product`, `zip_` and `chain` over dotted names.

STUDY = Study(
    name="mnist_dit",
    config="configs/mnist_dit.py:F/7",
    sweep=product({"model.variant": ["F/14", "F/7"]}, {"train.seed": [0, 1, 2]}),
    metric="fd_mnist",
)
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.files import read_json
from scaling.former_names import require_current
from scaling.python_files import load_module
from scaling.study.metric import Metric, metric_of
from scaling.study.tuning import Tune
from scaling.validation import check_stored

Overrides = dict[str, Any]  # dotted config name -> value, of one run
Part = Mapping[str, Sequence[Any]] | Sequence[Overrides]  # axes, or a sweep

MODEL_NAME = "model.name"
STORED: dict[str, Any] = {  # types of the values in study.json
    "name": str, "title": str, "question": str, "metric": dict[str, Any], "study": str, "config": str,
    "tolerance": float, "tune": dict[str, Any] | None, "overrides": dict[str, Any], "base": dict[str, Any],
    "runs": dict[str, dict[str, Any]],
}  # fmt: skip
TOLERANCE = 0.1
LONGEST_NAME = 120  # characters; file systems allow 255 bytes, and files inside need some of the path


def product(*parts: Part) -> list[Overrides]:
    """Returns every combination of values; the last name varies fastest.

    Args:
        parts: `{name: values, ...}` (each name is an axis) or a sweep made by another combinator.

    Raises:
        UserError: if two parts set the same name, or a combination comes twice.
    """
    factors = [factor for part in parts for factor in _factors(part)]
    return _unique([_merged(choice) for choice in itertools.product(*factors)])


def zip_(*parts: Part) -> list[Overrides]:
    """Returns values taken side by side: the first of each, the second of each, ...

    Raises:
        UserError: if the lengths differ, two parts set the same name, or a combination comes twice.
    """
    factors = [factor for part in parts for factor in _factors(part)]
    lengths = [len(factor) for factor in factors]
    if len(set(lengths)) > 1:
        described = ", ".join(f"{_keys(f)} has {len(f)}" for f in factors)
        raise UserError(f"zip_: the lists must be equally long, but {described}")
    return _unique([_merged(choice) for choice in zip(*factors, strict=True)])


def chain(*parts: Part) -> list[Overrides]:
    """Joins sweeps, one after the other. A mapping stands for its `product`.

    Raises:
        UserError: if a combination comes twice.
    """
    return _unique([run for part in parts for run in (product(part) if isinstance(part, Mapping) else part)])


def _factors(part: Part) -> Iterator[list[Overrides]]:
    if not isinstance(part, Mapping):
        yield list(part)
        return
    for key, values in part.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UserError(f"sweep {key}={values!r}: must be a list of values")
        yield [{key: value} for value in values]


def _merged(choice: Sequence[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in choice:
        for key, value in part.items():
            if key in merged:
                raise UserError(f"sweep {key}: is set twice in one run; name it in one part only")
            merged[key] = value
    return merged


def _keys(factor: Sequence[Overrides]) -> str:
    return "+".join(factor[0]) if factor else "an empty list"


def _unique(runs: list[Overrides]) -> list[Overrides]:
    identities: set[str] = set()
    for run in runs:
        identity = repr(sorted(run.items()))
        if identity in identities:
            raise UserError(f"sweep {_described(run)}: comes twice; remove one")
        identities.add(identity)
    return runs


def _described(run: Overrides) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in run.items()) or "{} (no overrides)"


# --- names ---------------------------------------------------------------------------------------


def run_names(runs: Sequence[Overrides]) -> list[str]:
    """Returns a folder name for each run, such as `variant=F-7_seed=0`.

    A name depends on the run's own overrides (and, where two would be equal, on those before it), so a
    sweep that grows at its end keeps the folders that it has.

    Raises:
        UserError: if two runs cannot be told apart by name.
    """
    names: list[str] = []
    for run in runs:
        name = next((n for n in (_run_name(run, False), _run_name(run, True)) if n not in names), None)
        if name is None:
            raise UserError(
                f"sweep {_described(run)}: has the same folder name as another run; change a value"
            )
        names.append(name)
    return names


def is_seed(key: str) -> bool:
    """Returns whether a swept key only repeats a run: its last part is `seed`."""
    return key.rsplit(".", 1)[-1] == "seed"


def without_seed(overrides: Mapping[str, Any]) -> Overrides:
    """Returns the overrides of a configuration, which runs of several seeds share."""
    return {key: value for key, value in overrides.items() if not is_seed(key)}


def _run_name(run: Overrides, dotted: bool) -> str:
    run = {key: run[key] for key in sorted(run, key=is_seed)}  # seeds last
    short = [key.rsplit(".", 1)[-1] for key in run]
    dotted = dotted or len(set(short)) < len(short)
    text = "_".join(f"{k if dotted else s}={_safe(v)}" for (k, v), s in zip(run.items(), short, strict=True))
    if len(text) > LONGEST_NAME:
        digest = hashlib.sha256(repr(sorted(run.items())).encode()).hexdigest()[:8]
        text = f"{text[: LONGEST_NAME - 9]}-{digest}"
    return text or "base"


def _safe(value: Any) -> str:
    text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text) or "empty"


# --- studies -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """A base config, the overrides of each run, and the metric in question.

    Args:
        name: name of the study and its charts; letters, digits, `_` and `-`.
        config: base config of every run, `PATH.py` or `PATH.py:ARGUMENT`; or one for each value of
            `model.name`, which every run then sets.
        sweep: one dict of dotted config names for each run.
        metric: a name among the evaluation's values, such as `fd_mnist`; or a `Metric`, which says more.
        title, question: text at the top of the report.
        tolerance: how near the truth a prediction has to be, as a share of it.
        tune: a key whose value is chosen on the smallest configurations first, and set in every run.

    Raises:
        UserError: naming the field that is wrong.
    """

    name: str
    config: str | Mapping[str, str]
    sweep: list[Overrides]
    metric: str | Metric
    title: str = ""
    question: str = ""
    tolerance: float = TOLERANCE
    tune: Tune | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"study name={self.name!r}: use letters, digits, _ and - only")
        if not isinstance(self.metric, str | Metric):
            raise UserError(f"study {self.name}: metric={self.metric!r}: must be a name, or a Metric")
        if not isinstance(self.tolerance, int | float) or not 0 < self.tolerance < 1:
            raise UserError(
                f"study {self.name}: tolerance={self.tolerance!r}: must be between 0 and 1, as 0.1"
            )
        try:
            object.__setattr__(self, "metric", self.measure)
        except UserError as e:
            raise UserError(f"study {self.name}: {e}") from None
        if not self.sweep:
            raise UserError(
                f"study {self.name}: sweep is empty; give at least one run ([{{}}] is the base config)"
            )
        if self.tune is not None:
            _check_tune(self.name, self.tune, self.sweep)
        for run in self.sweep:
            require_current(run)
            for key, value in run.items():
                _check_override(key, value)
            if not isinstance(self.config, str) and run.get(MODEL_NAME) not in self.config:
                raise UserError(
                    f"study {self.name}: {MODEL_NAME}={run.get(MODEL_NAME)!r}: must in every run be one of "
                    f"{', '.join(self.config)}, which have a config"
                )
        _unique(self.sweep)
        run_names(self.sweep)

    @property
    def measure(self) -> Metric:
        """The metric, with all that is known of it."""
        return Metric(self.metric) if isinstance(self.metric, str) else self.metric

    def config_of(self, overrides: Mapping[str, Any]) -> str:
        """Returns the base config of the run with these overrides."""
        return self.config if isinstance(self.config, str) else self.config[overrides[MODEL_NAME]]

    def runs(self) -> dict[str, Overrides]:
        """Returns the overrides of each run by its folder name, in the order of the sweep."""
        return dict(zip(run_names(self.sweep), self.sweep, strict=True))

    def as_json(
        self, path: str, overrides: Overrides | None = None, base: Overrides | None = None
    ) -> dict[str, Any]:
        """Returns the study as `study.json` holds it.

        Args:
            path: the study file, or its folder.
            overrides: overrides of every run, from the command line.
            base: the base config's values by dotted name, where it has been read.
        """
        return {
            "name": self.name, "title": self.title, "question": self.question,
            "metric": self.measure.as_json(), "tolerance": self.tolerance, "study": path,
            "tune": self.tune and self.tune.as_json(),
            "config": ", ".join(dict.fromkeys(map(self.config_of, self.sweep))),
            "overrides": overrides or {}, "base": base or {}, "runs": self.runs(),
        }  # fmt: skip


def _check_tune(name: str, tune: Tune, sweep: Sequence[Overrides]) -> None:
    if not isinstance(tune, Tune):
        raise UserError(f"study {name}: tune={tune!r}: must be Tune(key, values)")
    if any(tune.key in run for run in sweep):
        raise UserError(f"study {name}: tune {tune.key}: is swept as well; leave it out of the sweep")
    require_current([tune.key])
    for value in tune.values:
        _check_override(tune.key, value)


def _check_override(key: str, value: Any) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", key):
        raise UserError(f"sweep {key!r}: must be a dotted config name, such as 'model.variant'")
    parts = value if isinstance(value, tuple) else (value,)
    if not all(part is None or type(part) in (bool, int, float, str) for part in parts):
        raise UserError(f"sweep {key}={value!r}: must be a number, a string, a bool, None or a tuple of them")


def stored(root: Path) -> dict[str, Any] | None:
    """Returns the content of a folder's study.json, or None if there is none.

    Raises:
        UserError: if it cannot be read, or is not a study's.
    """
    path, advice = root / "study.json", "put the file back, or choose another folder"
    study = read_json(path, advice)
    if study is None:
        return None
    study = {
        "title": "", "question": "", "study": "", "config": "", "overrides": {}, "base": {},
        "tolerance": TOLERANCE, "tune": None, **study,
    }  # fmt: skip
    lower = study.pop("lower_is_better", None)
    if isinstance(study.get("metric"), str) and lower in (None, True, False):  # of an older study
        study["metric"] = metric_of(study["metric"], lower).as_json()
    check_stored(path, study, STORED, advice)
    try:
        metric_of(study["metric"])
    except UserError as e:
        raise UserError(f"{path}: {e}; {advice}") from None
    return study


def load(path: Path | str) -> Study:
    """Loads the `STUDY` of a Python file, or of `study.py` in a folder.

    Raises:
        UserError: if there is no such file, it fails, or it holds no `Study` of that name.
    """
    file = Path(path) / "study.py" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"study={path}: no such study; give a folder with a study.py, or a Python file")
    module = load_module(file, "study")
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise UserError(f"{file}: must define STUDY = scaling.study.sweep.Study(...)")
    return study
