"""Questions to a study: configurations that were not trained, their cost, and the law that they are of."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.errors import UserError
from scaling.overrides import flat
from scaling.study.evidence import DURATION, require_metric
from scaling.study.laws import LAWS, Law
from scaling.study.results import StudyFolder, read
from scaling.study.sweep import MODEL_NAME, Overrides, load, without_seed

Array = NDArray[np.float64]

COUNT = (sys.executable, "-m", "scaling.training.count")
LENGTH = (DURATION, "data.batch_size")
COVERED = ("model.", "train.seed", "mesh.", *LENGTH)
SAME = 0.005  # relative difference of examples up to which durations are the same


@dataclass(frozen=True)
class Question:
    """A configuration, and what it costs.

    Attributes:
        overrides: of the study's base config.
        group: its family, "" where the study has only one.
        facts: `gmacs`, `tokens`, `gmacs_per_token`, `params`, `examples` and `train_flops`.
        of_length: whether a duration was asked for.
    """

    overrides: Overrides
    group: str
    facts: Mapping[str, float]
    of_length: bool = False

    def has(self, law: str) -> bool:
        """Returns whether every quantity of a law is known of it: a ResNet has no tokens."""
        return all(name in self.facts for name in LAWS[law][0])

    def x(self, law: Law) -> Array:
        """Returns its quantities [1, K] in a law."""
        return np.array([[self.facts[name] for name in LAWS[law.name][0]]], float)


def ask(folder: StudyFolder, asked: Sequence[Overrides], strict: bool = True) -> list[Question]:
    """Returns questions: the study's largest configuration with these overrides, each counted.

    They are counted in another process, since that takes jax. If not `strict`, those with a wrong config are
    left out.

    Raises:
        UserError: if an override is of a key that no law has as a quantity, or the config is wrong.
    """
    base, trained = _base(folder), _trained(folder)
    given = [{**base, **overrides} for overrides in asked]
    sources = _sources(folder, given)
    answers = _counted([
        {"source": source, "overrides": whole, "base": base, "run": trained}
        for source, whole in zip(sources, given, strict=True)
    ])  # fmt: skip
    several = len({run.overrides.get(MODEL_NAME) for run in folder.runs}) > 1
    questions = []
    for overrides, whole, answer in zip(asked, given, answers, strict=True):
        if "error" in answer and not strict:
            continue
        if "error" in answer:
            raise UserError(answer["error"])
        _require_covered(folder, overrides, answer.pop("config"))
        if not answer["gmacs"]:
            raise UserError(f"{_words(overrides)}: its gmacs could not be counted")
        facts = {key: float(value) for key, value in answer.items() if value is not None}
        if "tokens" in facts:
            facts["gmacs_per_token"] = facts["gmacs"] / facts["tokens"]
        group = str(whole[MODEL_NAME]) if several else ""
        of_length = any(key in LENGTH for key in overrides)
        questions.append(Question(whole, group, facts, of_length))
    return questions


def _counted(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    ended = subprocess.run(COUNT, input=json.dumps(requests), capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"counting the configuration ended with exit code {ended.returncode}: {last}")
    answers: list[dict[str, Any]] = json.loads(ended.stdout)
    return answers


def _base(folder: StudyFolder) -> Overrides:
    """Returns the overrides of the study's largest configuration, without its seed."""
    table = folder.table[folder.table["gmacs"].notna()].sort_values("train_flops")
    if table.empty:
        raise UserError(f"{folder.path}: no run has been measured yet, so there is no law to ask")
    largest = table["run"].iloc[-1]
    run = next(run for run in folder.runs if run.name == largest)
    return {**folder.study["overrides"], **without_seed(run.overrides)}


def _sources(folder: StudyFolder, asked: Sequence[Overrides]) -> list[str]:
    """Returns the config file of a run with each of these overrides."""
    source: str = folder.study["config"]
    if ", " not in source:
        return [source] * len(asked)
    return list(map(load(folder.study["study"]).config_of, asked))  # of a config for each family


def _trained(folder: StudyFolder) -> str | None:
    """Returns the folder of a run that tells what the data were, if there is one."""
    return next((str(run.folder) for run in folder.runs if (run.folder / "config.json").is_file()), None)


def _require_covered(folder: StudyFolder, asked: Overrides, config: Mapping[str, Any]) -> None:
    """Checks that what was asked differs from the runs, of this config, in quantities of laws alone."""
    known = flat(config)
    for key, value in asked.items():
        ran = {str(run.overrides.get(key, known.get(key))) for run in folder.runs}
        if not key.startswith(COVERED) and ran != {str(value)}:
            raise UserError(
                f"{key}={value!r}: no law has it as a quantity, and the runs have {', '.join(sorted(ran))}; "
                "ask for keys of model, or train.duration"
            )


def _words(overrides: Overrides) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in overrides.items()) or "the largest configuration"


def choose(laws: Sequence[Law], question: Question) -> Law:
    """Returns the likeliest law that covers a question.

    Runs of the length of the study's are of the law in gmacs or, where the number of tokens varies, that in
    tokens and gmacs per token, whichever has more evidence; other lengths are of that in gmacs and examples.

    Raises:
        UserError: if none covers it; it says why, and what would.
    """
    mine = [law for law in laws if law.group == question.group]
    if not mine:
        groups = ", ".join(dict.fromkeys(law.group for law in laws))
        raise UserError(
            f"{MODEL_NAME}={question.group!r}: is no family of the study; it has {groups or 'none'}"
        )
    by_name = {law.name: law for law in mine}
    same = _same_length(by_name["gmacs"], question)
    fitted = [
        law for law in mine if law.belief and (law.name != "examples") == same and question.has(law.name)
    ]
    if fitted:
        return max(fitted, key=lambda law: law.belief.log_evidence if law.belief else -np.inf)
    if same:
        raise UserError(f"no law: {by_name['gmacs'].reason}")
    if "examples" in by_name:
        raise UserError(f"no law in gmacs and examples: {by_name['examples'].reason}")
    raise UserError(
        f"{question.facts['examples']:,.0f} examples: every value of the study is of one other duration, "
        "which no law goes beyond; sweep train.duration, or keep a constant learning rate"
    )


def covers(law: Law, question: Question) -> bool:
    """Returns whether a configuration is of a law's family, quantities and, unless these say it, duration."""
    of_length = law.name == "examples" or _same_length(law, question)
    return law.group == question.group and of_length and question.has(law.name)


def _same_length(law: Law, question: Question) -> bool:
    examples = law.table["examples"].dropna()
    if examples.empty:  # an older table, which does not say
        return not question.of_length
    return bool(abs(question.facts["examples"] / examples.median() - 1) <= SAME)


def study_folder(path: Path) -> StudyFolder:
    """Reads a study folder.

    Raises:
        UserError: if it is none, or no run was measured by the study's metric.
    """
    folder = read(path)
    require_metric(folder)
    return folder
