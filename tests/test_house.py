"""What holds of every file of the package and its tests."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_file_is_over_400_lines() -> None:
    files = [path for folder in ("scaling", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert ROOT / "scaling/models/vit.py" in files
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 400} == {}
