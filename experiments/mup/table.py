"""Prints the table of README.md from the runs: python experiments/mup/table.py runs/mup."""

import sys

from scaling.study import results

WIDTH, BASE, RATE = "model.width", "optimizer.mup_base", "optimizer.learning_rate"


def main(workdir: str) -> None:
    """Prints the loss at each width and rate, and the best rates."""
    folder = results.read(workdir)
    last = folder.table.groupby("run").last()
    last[BASE] = last[BASE].fillna("").map(lambda base: "muP" if base else "standard")
    for name, rows in last.groupby(BASE, sort=False):
        table = rows.pivot_table(index=WIDTH, columns=RATE, values=folder.metric.name, dropna=False)
        print(f"\n{name}\n\n| width | " + " | ".join(f"{rate:g}" for rate in table) + " | best |")
        print("| --- " * (len(table.columns) + 2) + "|")
        for width, values in table.iterrows():
            cells = " | ".join("diverged" if value != value else f"{value:.4f}" for value in values)
            print(f"| {width} | {cells} | {values.idxmin():g} |")


if __name__ == "__main__":
    main(sys.argv[1])
