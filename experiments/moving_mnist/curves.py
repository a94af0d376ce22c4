"""The runs beside the study as a table and a picture: from scratch, started from an image model, shuffled.

python experiments/moving_mnist/curves.py [RUNS]

With RUNS, reads RUNS/<name>/metrics.jsonl and writes controls.csv here; draws start.png from controls.csv.
"""

import sys
from pathlib import Path

import altair as alt
import pandas as pd

from scaling.run.folder import read_events
from scaling.study.charts import png, rows_chart, side_by_side, specification, svg

HERE = Path(__file__).parent
METRICS = {"val_top1": "item and motion", "val_item": "item", "val_motion": "motion"}
RUNS = {"joint": "from scratch", "started": "started from an image ViT", "shuffled": "frames shuffled"}
COLOURS = ["#2c718e", "#b3420a", "#3f9c35"]


def table(runs: Path) -> pd.DataFrame:
    """Returns a row for each run and evaluated step."""
    rows = [
        {"run": folder.name, "step": event["step"], **{name: event["values"][name] for name in METRICS}}
        for folder in sorted(runs.iterdir())
        if folder.is_dir()
        for event in read_events(folder)
        if event["event"] == "evaluate" and "val_motion" in event["values"]
    ]
    return pd.DataFrame(rows)


def panel(accuracies: pd.DataFrame, metric: str, title: str) -> alt.LayerChart:
    """Draws the accuracy of every run against its steps."""
    rows = accuracies[accuracies.run.isin(RUNS)].assign(label=accuracies.run.map(RUNS))
    scale = alt.Scale(domain=list(RUNS.values()), range=COLOURS)
    base = rows_chart(rows[["label", "step", metric]]).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=4)),
        y=alt.Y(f"{metric}:Q", title="accuracy", scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("label:N", scale=scale, legend=alt.Legend(title=None)),
    )
    chart = alt.layer(base.mark_line(strokeWidth=1.8), base.mark_point(filled=True, size=30, opacity=1))
    return chart.properties(
        width=190, height=200, title=alt.TitleParams(title, anchor="start", frame="group")
    )


def draw(accuracies: pd.DataFrame) -> bytes:
    """Draws a panel for each metric, side by side, as a PNG file."""
    panels = [panel(accuracies, metric, title) for metric, title in METRICS.items()]
    return png(svg(specification(side_by_side(panels))))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        table(Path(sys.argv[1])).to_csv(HERE / "controls.csv", index=False)
    (HERE / "start.png").write_bytes(draw(pd.read_csv(HERE / "controls.csv")))
