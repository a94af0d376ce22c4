"""The runs beside the study as a table and a picture: from scratch, started from an image model, shuffled.

python experiments/moving_mnist/curves.py RUNS     (reads RUNS/<name>/metrics.jsonl; writes here)
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from scaling.engine.runfolder import read_events

HERE = Path(__file__).parent
METRICS = {"val_top1": "item and motion", "val_item": "item", "val_motion": "motion"}
DRAWN = {"joint": "from scratch", "started": "started from an image ViT", "shuffled": "frames shuffled"}


def table(runs: Path) -> pd.DataFrame:
    """A row for each run and evaluated step."""
    rows = [
        {"run": folder.name, "step": event["step"], **{name: event["values"][name] for name in METRICS}}
        for folder in sorted(runs.iterdir())
        if folder.is_dir()
        for event in read_events(folder)
        if event["event"] == "evaluate" and "val_motion" in event["values"]
    ]
    return pd.DataFrame(rows)


def draw(found: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 3, sharey=True), METRICS.items(), strict=True):
        for run, label in DRAWN.items():
            rows = found[found.run == run]
            axes.plot(rows.step, rows[metric], marker="o", markersize=3, label=label)
        axes.set(title=f"accuracy of {title}", xlabel="step", ylim=(0, 1.02))
        axes.grid(color="#e4e4e4")
    figure.axes[1].legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    found = table(Path(sys.argv[1]))
    found.to_csv(HERE / "controls.csv", index=False)
    draw(found).savefig(HERE / "start.png", dpi=120)
