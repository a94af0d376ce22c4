"""A sample of each part's cases; `make test-faults` tries them all."""

from itertools import islice
from pathlib import Path

import pytest

from tests.faults.harness import FAULTS, PARTS, ROOT, Case, Outcome, cases_of, judge, try_case

EVERY = {"kills": 22, "damage": 40, "input": 31, "limits": 40}  # part -> one of so many cases is tried here


# Limits are set between fork and exec, which JAX and others warn of.
@pytest.mark.filterwarnings(
    "ignore:os.fork", "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("part", EVERY)
def test_a_sample_of_the_cases_finds_no_fault(part: str, tmp_path: Path) -> None:
    found = {}
    for i, case in enumerate(islice(cases_of(part), 0, None, EVERY[part])):
        outcome = try_case(case, tmp_path / str(i))
        if outcome.kind in FAULTS:
            found[case.name] = outcome
    assert not found


def test_every_part_has_its_sample() -> None:
    assert {part for part in PARTS if (ROOT / f"tests/faults/{part}.py").exists()} == set(EVERY)


@pytest.mark.parametrize(
    ("code", "said", "kind"),
    [
        (2, "run: resumed\nerror: seed=-1: must be at least 0\n", "clear"),
        (2, "usage: scaling train\nscaling train: error: argument --seed: invalid int\n", "clear"),
        (0, "done\n", "silent"),
        (1, "error: seed=-1\n", "unclear"),
        (2, "error: a\nerror: b\n", "unclear"),
        (2, "error: " + "x" * 1000, "unclear"),
        (1, "Traceback (most recent call last):\n  ...\nValueError: 3\n", "traceback"),
    ],
)
def test_an_answer_is_judged_by_its_code_and_its_lines(code: int, said: str, kind: str) -> None:
    assert judge(code, said).kind == kind


def test_what_a_case_raises_is_a_traceback(tmp_path: Path) -> None:
    def _raise(folder: Path) -> Outcome:
        raise ValueError("no")

    outcome = try_case(Case("raises", _raise), tmp_path / "case")
    assert outcome.kind == "traceback" and "no" in outcome.detail
