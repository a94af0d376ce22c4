"""How often the intervals of `scaling.laws` hold the truth: python experiments/laws/simulate.py.

Each cell is a truth and a design. A replication draws a study, fits it, and asks whether the intervals
hold; rows are kept in `runs/laws/*.jsonl`, so that the same command goes on where it was stopped.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaling.laws import Values, believe
from scaling.laws.belief import INTERVAL, REFUTED, interval
from scaling.laws.held_out import SURPRISE, held_out
from scaling.laws.optimal import optimal
from scaling.progress import track

Array = NDArray[np.float64]

RANGE = 100.0  # ratio of the largest and the smallest x
PARTICLES = 500
HELD_OUT = 200  # number of replications of a cell that are fitted again without the largest, too
BEYOND = 4.0  # the new run's x, in units of the largest
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """One truth and one design: a law of one quantity."""

    truth: str
    points: int
    seeds: int
    noise: float


def power(x: Array, floor: float = 0.0, alpha: float = 0.35) -> Array:
    """Returns x^-alpha plus an irreducible term, which is the given share of y at the largest x."""
    return x**-alpha + RANGE**-alpha * floor / (1 - floor)


def bent(x: Array, before: float, after: float, place: float = 0.6) -> Array:
    """Returns a power law whose exponent changes at a place in the range of log x."""
    u, whole = np.log(x), np.log(RANGE)
    return np.exp(-before * np.minimum(u, place * whole) - after * np.maximum(u - place * whole, 0))


LAWS: dict[str, Callable[[Array], Array]] = {
    "power": power,
    "power + E": functools.partial(power, floor=0.5),
}
FLATTENING: dict[str, Callable[[Array], Array]] = {
    "flattens": functools.partial(bent, before=0.5, after=0.15),
    "stops": functools.partial(bent, before=0.4, after=0.0),
    "rises": functools.partial(bent, before=0.4, after=-0.1, place=0.7),
    "under-trained": lambda x: x**-0.4 * (1 + 0.5 * x / RANGE),
}
TRUTHS = LAWS | FLATTENING


def cells() -> Iterator[Cell]:
    """Yields the cells of laws, then those that flatten."""
    designs = itertools.product(LAWS, (9, 12, 20), (1, 3), (0.02, 0.05, 0.1))
    yield from (Cell(*design) for design in designs)
    yield from (Cell(truth, 20, 5, noise) for truth in FLATTENING for noise in (0.02, 0.05))


def study(cell: Cell, rng: np.random.Generator) -> Values:
    """Returns the values of a simulated study."""
    x = np.geomspace(1, RANGE, cell.points)
    y = TRUTHS[cell.truth](x)[:, None] * np.exp(cell.noise * rng.normal(size=(cell.points, cell.seeds)))
    points = [f"{i}" for i in range(cell.points) for _ in range(cell.seeds)]
    runs = tuple(map(str, range(y.size)))
    return Values(("x",), np.repeat(x, cell.seeds)[:, None], y.ravel(), tuple(points), runs, np.zeros(y.size))


def replicate(cell: Cell, number: int) -> dict[str, float]:
    """Returns whether the intervals of one simulated study hold the truth, and the weight of its form."""
    rng = np.random.default_rng([number, cell.points, cell.seeds, round(1000 * cell.noise), len(cell.truth)])
    belief = believe(study(cell, rng), seed=number, particles=PARTICLES)
    truth = TRUTHS[cell.truth]
    x, beyond = np.geomspace(1, RANGE, cell.points), np.array([BEYOND * RANGE])
    low, high = interval(belief.curve(x[:, None]), INTERVAL)
    least, most = interval(belief.runs(beyond[:, None])[:, 0], INTERVAL)
    run = truth(beyond)[0] * np.exp(cell.noise * rng.normal())
    row = {
        "curve": float(np.mean((low <= truth(x)) & (truth(x) <= high))),
        "run": float(least <= run <= most),
        "width": float(most / least),
        "weight": float(belief.weights[0]),
    }
    if number < HELD_OUT:
        others = held_out(belief)
        row["probability"] = others.probability if others else 1.0
    if cell.truth in LAWS:
        ends = {name: interval(draws, INTERVAL) for name, draws in belief.parameters.items()}
        floor = truth(np.array([np.inf]))[0]
        row["alpha"] = float(ends["alpha"][0] <= 0.35 <= ends["alpha"][1])
        row["E"] = float((floor == 0 or ends["E"][0] <= floor) and floor <= ends["E"][1])
    return row


# --- the compute-optimal frontier ---

TRUE_JOINT = {"E": 0.2, "A": 1.0, "B": 1.5, "alpha": 0.5, "beta": 0.4}
EXPONENT = 0.5 * 0.4 / 0.9


def replicate_joint(noise: float, number: int) -> dict[str, float]:
    """Returns whether the interval of the compute-optimal exponent holds it, of 7 sizes x 5 lengths."""
    rng = np.random.default_rng([number, round(1000 * noise)])
    size, data = (a.ravel() for a in np.meshgrid(np.geomspace(1, 80, 7), np.geomspace(1, 16, 5)))
    p = TRUE_JOINT
    y = p["E"] + p["A"] * size ** -p["alpha"] + p["B"] * data ** -p["beta"]
    y = y * np.exp(noise * rng.normal(size=len(y)))
    names = tuple(map(str, range(len(y))))
    belief = believe(
        Values(("N", "D"), np.stack([size, data], 1), y, names, names, np.zeros(len(y))),
        "joint",
        seed=number,
        particles=PARTICLES,
    )
    low, high = interval(optimal(belief, np.array([100.0]), 1.0).exponents["y"], INTERVAL)
    return {"exponent": float(low <= EXPONENT <= high), "width": float(high - low)}


# --- the table ---


def _rows(
    file: Path, replicate: Callable[[int], dict[str, float]], count: int, workers: int
) -> list[dict[str, float]]:
    """Returns the rows of a cell, of which those not in its file are computed and appended."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with multiprocessing.Pool(workers) as pool, file.open("a") as out:
        numbers = range(len(rows), count)
        for row in track(pool.imap(replicate, numbers, chunksize=4), file.stem, len(numbers)):
            rows.append(row)
            out.write(f"{json.dumps(row)}\n")
    return rows[:count]


def _mean(rows: list[dict[str, float]], key: str) -> float:
    return float(np.mean([row[key] for row in rows])) if key in rows[0] else float("nan")


def main() -> None:
    """Simulates every cell, and prints the table of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=600, help="of each cell (default: 600)")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/laws"))
    options = parser.parse_args()
    print(
        "| truth | points | seeds | noise | alpha | E | curve | new run | width | refuted | down-weighted |"
    )
    print("| --- " * 11 + "|")
    of_laws: list[list[float]] = []
    for cell in cells():
        file = options.out / (
            "_".join(str(value) for value in asdict(cell).values()).replace(" ", "") + ".jsonl"
        )
        rows = _rows(file, functools.partial(replicate, cell), options.replications, options.workers)
        tested = rows[:HELD_OUT]
        refuted = np.mean([row["weight"] < REFUTED or row["probability"] < SURPRISE for row in tested])
        down = np.mean([row["weight"] < 0.5 for row in rows])
        shares = [f"{_mean(rows, key):.3f}" for key in ("alpha", "E", "curve", "run")]
        width = float(np.median([row["width"] for row in rows]))
        if cell.truth in LAWS:
            of_laws.append([_mean(rows, key) for key in ("alpha", "curve", "run")] + [float(refuted)])
        print(
            f"| {cell.truth} | {cell.points} | {cell.seeds} | {cell.noise:.0%} | {' | '.join(shares)} | "
            f"{width:.2f} | {refuted:.3f} | {down:.3f} |",
            flush=True,
        )
    means, least, most = (f(np.array(of_laws), 0) for f in (np.mean, np.min, np.max))
    print("\n| over the cells of laws | alpha | curve | new run | refuted |\n| --- " + "| --- " * 4 + "|")
    for title, values in (("mean", means), ("least", least), ("most", most)):
        print(f"| {title} | {' | '.join(f'{value:.3f}' for value in values)} |")
    print("\n| noise | compute-optimal exponent held | median width |\n| --- | --- | --- |")
    for noise in (0.01, 0.02, 0.05):
        rows = _rows(
            options.out / f"joint_{noise}.jsonl", functools.partial(replicate_joint, noise),
            options.replications, options.workers,
        )  # fmt: skip
        print(
            f"| {noise:.0%} | {_mean(rows, 'exponent'):.3f} | {np.median([r['width'] for r in rows]):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
