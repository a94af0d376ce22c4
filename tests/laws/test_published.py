"""Published values, fitted again: the command of experiments/published, and what it finds."""

import re

import pytest

from experiments.published import fit


def test_clips_frontiers_are_cherti_et_als_and_the_largest_are_predicted() -> None:
    frontiers, of_set = fit.clip().split("\n\n")
    laion, openai, _ = re.findall(r"\| ([\d.]+) C\^-([\d.]+) \| \S* ?C", frontiers)
    assert [float(value) for value in laion] == pytest.approx([5.86, 0.111], rel=5e-3)
    assert [float(value) for value in openai] == pytest.approx([23.2, 0.164], rel=5e-3)
    found = re.findall(r"\| ([\d.]+) \| [\d.]+ \[([\d.]+), ([\d.]+)\] \|$", of_set, re.MULTILINE)
    assert len(found) == 3
    assert all(float(low) < float(was) < float(high) for was, low, high in found)


def test_dits_correlation_is_the_papers() -> None:
    assert "of log gmacs and FID: -0.93 (the paper prints -0.93)" in fit.dit()
