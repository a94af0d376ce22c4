"""The command: help that needs no jax, overrides, exit codes, and the registered models as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scaling import cli

ROOT = Path(__file__).parents[1]
MEASURED = {"val_loss", "val_top1", "val_top1_se", "val_top5", "val_top5_se"}  # of a classifier
VERBS = [
    "train",
    "evaluate",
    "sample",
    "encode",
    "sweep",
    "report",
    "models",
    "import",
    "export",
    "plan",
    "law",
    "predict",
    "advise",
    "compare",
]


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_loads_nothing_heavy(verb: str) -> None:
    script = (
        "import sys, time, scaling.cli\n"
        "try: scaling.cli.main(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'jax', 'flax', 'numpy', 'tensorflow', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 0.5, 'seconds of this process, its start included'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *([verb] if verb else []), "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: scaling" in done.stdout
    if verb:
        assert "Example: scaling " + verb in done.stdout


def test_overrides_in_both_forms() -> None:
    rest, overrides = cli._split(
        ["train", "--config=a.py", "--config.a.b=1", "--config.c.d", "2", "--workdir=w"]
    )
    assert rest == ["train", "--config=a.py", "--workdir=w"]
    assert overrides == ["a.b=1", "c.d=2"]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(
        [
            "train",
            f"--config={ROOT / 'tests/support/tiny_vit.py'}",
            "--config.train.sed=1",
            f"--workdir={tmp_path / 'run'}",
        ]
    )
    said = capsys.readouterr().err
    assert code == 2
    assert (
        said.startswith("error: train.sed: no such key; did you mean train.seed?") and said.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_a_verb_without_a_config_refuses_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["models", "--config.a.b=1"])
    assert left.value.code == 2
    assert "models takes no config" in capsys.readouterr().err


def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={ROOT / 'tests/support/tiny_vit.py'}"
    assert (
        cli.main(["train", config, "--config.train.duration=4 steps", f"--workdir={tmp_path / 'run'}"]) == 0
    )
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == MEASURED


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--run=runs/a", "--out=a.png"], "--run: is now the run's folder without a flag"),
        (["evaluate", "--run", "runs/a"], "--run: is now the run's folder without a flag"),
        (["models", "--family=dit"], "--family: is now --name"),
        (["sample", "runs/a", "--out=a.png", "--guidance=2"], "--guidance: is now --guidance-scale"),
    ],
)
def test_an_old_flag_answers_with_the_new_one(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and f"error: {said}" in capsys.readouterr().err


def test_the_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--name=dit", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    keys = {"family", "variant", "input_shape", "tokens", "params", "gmacs", "gflops", "block"}
    assert all(keys <= row.keys() for row in rows)
    found = {(row["variant"], row["block"]): row for row in rows}
    xl2 = found["XL/2", "adaln-zero"]
    assert xl2["params"] == 674_834_720 and xl2["tokens"] == 256 and xl2["input_shape"] == [32, 32, 4]
    assert xl2["gflops"] == pytest.approx(2 * xl2["gmacs"]) and xl2["gmacs"] == pytest.approx(
        118.621, rel=1e-3
    )
    assert cli.main(["models", "--name=timesformer"]) == 0
    assert "B/16" in capsys.readouterr().out
    assert cli.main(["models", "--name=resnext"]) == 2
