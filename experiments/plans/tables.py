"""The tables of README.md, in Markdown, from plans.jsonl: python experiments/plans/tables.py"""

import json
from pathlib import Path
from typing import Any

from scaling.plan import hardware

ROWS = [json.loads(line) for line in (Path(__file__).parent / "plans.jsonl").read_text().splitlines()]
GATHERED, REDUCED = ("all-gather", "all-to-all"), ("reduce-scatter", "all-reduce", "collective-permute")
TERMS = {"TPUs": ("cycles", "attention", "network"), "GPUs": ("matmuls", "memory", "kernels", "network")}


def mebibytes(row: dict[str, Any], kinds: tuple[str, ...]) -> str:
    """Of the arrays that such collectives work on."""
    return f"{sum(each['bytes'] for each in row['collectives'] if each['kind'] in kinds) / 2**20:,.0f}"


def cells(row: dict[str, Any], terms: tuple[str, ...]) -> list[str]:
    said = [row["config"]]
    said += ["unrolled"] if "unroll=True" in row["options"] else []
    said += ["512 pixels"] if "--side=64" in row["options"] else []
    mesh = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1) or "one"
    needed = f"{row['hbm_gib_needed']:.1f} of {row['hbm_gib_available']}"
    first = [", ".join(said), row["topology"], mesh, str(row["batch"]), row["remat"], needed]
    moved = [f"{row['work_ratio']:.3f}", mebibytes(row, GATHERED), mebibytes(row, REDUCED)]
    times = [f"{row['milliseconds'][term]:,.0f}" for term in terms]
    return [*first, *moved, *times, f"{row['step_time_ms']:,.0f}", f"{row['mfu']:.2f}"]


def main() -> None:
    for kind, terms in TERMS.items():
        head = ["config", "slice" if kind == "TPUs" else "node", "mesh", "batch", "remat", "GiB per chip"]
        head += ["matmuls", "gathered, MiB", "reduced, MiB", *(f"{term}, ms" for term in terms)]
        head += ["step, ms", "MFU"]
        there = [row for row in ROWS if row["what"] == "train" and kind == _kind(row)]
        lines = [head, ["---"] * len(head), *(cells(row, terms) for row in there)]
        print(f"## {kind}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def _kind(row: dict[str, Any]) -> str:
    return "GPUs" if hardware.slice_of(row["topology"])[0].switched else "TPUs"


if __name__ == "__main__":
    main()
