"""`scaling law`: published laws from published tables, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling import cli
from tests.test_house import ROOT

PUBLISHED = ROOT / "experiments/published"
JOINT = ["--x=params,tokens", "--y=loss"]


def law(capsys: pytest.CaptureFixture[str], file: Path, *flags: str) -> dict:
    assert cli.main(["law", str(file), *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def chinchilla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of Epoch AI (Besiroglu et al. 2024), who leave out the five highest losses."""
    file = tmp_path_factory.mktemp("chinchilla") / "table.csv"
    table = pd.read_csv(PUBLISHED / "chinchilla.csv")
    table.sort_values("loss").iloc[:-5].to_csv(file, index=False)
    return file


def test_chinchillas_surface_is_that_of_besiroglu(
    capsys: pytest.CaptureFixture[str], chinchilla: Path
) -> None:
    """Besiroglu et al. 2024, table 1: estimates and standard errors; figure 5 for the frontier."""
    found = law(capsys, chinchilla, *JOINT, "--budget=5.76e23")
    published = {
        "E": (1.8172, 0.026), "A": (482.0, 125.0), "B": (2085.0, 1293.0),
        "alpha": (0.3478, 0.015), "beta": (0.3659, 0.021),
    }  # fmt: skip
    for name, (estimate, error) in published.items():
        assert abs(found["parameters"][name] - estimate) < error, name
    assert found["optimal"]["exponents"]["size"]["value"] == pytest.approx(0.51, abs=0.01)
    assert found["optimal"]["budgets"][0]["y"]["value"] == pytest.approx(1.974, abs=0.01)


def test_dits_largest_models_are_predicted_from_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Peebles and Xie 2023, table 4: XL/2 had 19.47 and L/2 23.33, which a law in gmacs alone misses."""
    table = pd.read_csv(PUBLISHED / "dit_table4.csv")
    table[~table.model.isin(["DiT-L/2", "DiT-XL/2"])].to_csv(tmp_path / "others.csv", index=False)
    flags = [f"--at=tokens=256,gmacs_per_token={g}" for g in (0.463363, 0.315227)]
    found = law(
        capsys, tmp_path / "others.csv", "--x=tokens,gmacs_per_token", "--y=fid50k", "--form=surface", *flags
    )
    for prediction, actual in zip(found["predictions"], (19.47, 23.33), strict=True):
        assert prediction["low"] < actual < prediction["high"]
        assert prediction["value"] == pytest.approx(actual, rel=0.1)
    alone = law(
        capsys, tmp_path / "others.csv", "--x=gmacs", "--y=fid50k", "--at=gmacs=118.62", "--at=gmacs=80.70"
    )
    assert alone["predictions"][0]["value"] > 22


def test_the_recalled_values_of_dits_table_pass_the_papers_own_check() -> None:
    """Peebles and Xie 2023, figure 8: the correlation of log gmacs and FID is -0.93."""
    table = pd.read_csv(PUBLISHED / "dit_table4.csv")
    assert np.corrcoef(np.log(table.gmacs), table.fid50k)[0, 1] == pytest.approx(-0.93, abs=0.005)


TABLE = "group,x,y\n" + "".join(f"{'ab'[i % 2]},{2**i},{2 + 3 * 2 ** -(0.4 * i):.4f}\n" for i in range(14))


def test_groups_have_laws_of_their_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(TABLE + "c,1,2\n")
    found = law(capsys, file, "--x=x", "--y=y", "--by=group")["groups"]
    assert found["a"]["values"] == found["b"]["values"] == 7
    assert found["c"]["error"].startswith("form='power': 1 different configurations")
    assert cli.main(["law", str(file), "--x=x", "--y=y", "--by=group", "--at=x=99"]) == 0
    text = capsys.readouterr().out
    assert "group a\npower: y = E + A x^-alpha, 7 values of x" in text
    assert text.count("a run lies in") == 2


def test_x_that_differ_in_their_last_digits_are_two_configurations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "t.csv"
    file.write_text("x,y\n" + "".join(f"{10**7 + i},{3 - 0.1 * i}\n" for i in range(6)))
    assert set(law(capsys, file, "--x=x", "--y=y")["spreads"]) == {"configurations"}


def test_rows_without_a_logarithm_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(TABLE + "c,1,-2\nc,,1\nc,3,inf\n")
    found = law(capsys, file, "--x=x", "--y=y")
    assert found["values"] == 14
    assert found["left_out"] == [
        "row 14: y = -2 has no logarithm",
        "row 15: x has no value",
        "row 16: y = inf is infinite",
    ]


BAD = {
    "--x=x --y=z": "column 'z': is not in the table; it has group, x, y",
    "--x=group --y=y": "column 'group': must hold numbers (",
    "--x=x,y,y2,y3 --y=y": "column 'y2': is not in the table",
    "--x=x --y=y --form=joint": "form='joint': takes 2 quantities, not x; for these: power, ",
    "--x=x --y=y --form=cubic": "form='cubic': is none; there are ",
    "--x=x --y=y --by=z": "column 'z': is not in the table",
    "--x=x --y=y --at=z=1": "at=z: must give x",
    "--x=x --y=y --budget=1e20": "form='power': has no compute-optimal frontier; the form joint has",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_what_no_law_covers_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: str
) -> None:
    file = tmp_path / "t.csv"
    file.write_text(TABLE)
    assert cli.main(["law", str(file), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {BAD[flags]}") and error.count("\n") == 1


@pytest.mark.parametrize(
    "content", [None, "", "x,y\n", "x,y\n1,2\n2,1\n", 'x,y\n"1,2\n', "x,y\n1,-1\n2,-2\n"]
)
def test_a_file_that_has_no_law_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "t.csv"
    if content is not None:
        file.write_text(content)
    assert cli.main(["law", str(file), "--x=x", "--y=y"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
