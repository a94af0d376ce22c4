"""`python -m tests.faults [PART ...]`: tries every case, keeps the outcomes, and goes on where it stopped."""

import argparse
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from tests.faults.harness import FAULTS, KINDS, PARTS, ROOT, Outcome, cases_of, try_case


def main() -> int:
    """Tries the cases of the parts; returns 1 if any of them found a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/faults", help="folder of the outcomes")
    parser.add_argument("--again", action="store_true", help="try those again that found a fault")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # verbs import jax when they run
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache/xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = {part: _try_part(part, options.out, options.again) for part in options.parts or PARTS}
    print(_table(outcomes))
    found = [(part, name, o) for part, tried in outcomes.items() for name, o in tried.items()]
    for part, name, outcome in found:
        if outcome.kind in FAULTS:
            print(f"{part} {name}: {outcome.kind}: {outcome.detail}")
    return int(any(outcome.kind in FAULTS for _, _, outcome in found))


def _try_part(part: str, out: Path, again: bool) -> dict[str, Outcome]:
    """Tries the cases of a part that were not tried before; returns the outcome of each."""
    record = out / f"{part}.jsonl"
    lines = map(json.loads, record.read_text().splitlines()) if record.exists() else iter(())
    known = {line["name"]: Outcome(line["kind"], line["detail"]) for line in lines}
    if again:
        known = {name: outcome for name, outcome in known.items() if outcome.kind not in FAULTS}
    cases = list(cases_of(part))
    assert len({case.name for case in cases}) == len(cases), "two cases have one name"
    for case in tqdm([case for case in cases if case.name not in known], desc=part, unit="case"):
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        known[case.name] = outcome = try_case(case, folder / "case")
        shutil.rmtree(folder, ignore_errors=True)
        with record.open("a") as file:
            file.write(json.dumps({"name": case.name, "kind": outcome.kind, "detail": outcome.detail}) + "\n")
    return {case.name: known[case.name] for case in cases}


def _table(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """Returns a table in Markdown: a row for each part, a column for each kind of outcome."""
    rows: list[Iterable[object]] = [("part", "tried", *KINDS), ("---",) * (2 + len(KINDS))]
    for part, tried in outcomes.items():
        counts = Counter(outcome.kind for outcome in tried.values())
        rows.append((part, len(tried), *(counts[kind] for kind in KINDS)))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
