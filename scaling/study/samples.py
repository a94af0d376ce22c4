"""Sample grids of a study: the last of each configuration, and all of them on one picture."""

import io
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from scaling.files import make_folder, write_atomic
from scaling.study.results import RunRecord, StudyFolder

CELL, GAP = 360, 16  # pixels: width of a grid on the picture, about, and the space around it
FONT = 18  # pixels: height of a caption's letters
LINE = 24  # pixels: height of a caption's line


def gallery(folder: StudyFolder) -> list[tuple[str, Path]]:
    """Returns (caption, file) of each configuration with samples: its first run's last grid, by gmacs."""
    table, metric, labels = folder.table, folder.metric.name, folder.labels()
    grids: dict[str, tuple[float, str, Path]] = {}
    for run in folder.runs:
        image, rows = last_sample(run), table[table.run == run.name]
        if image is None or rows.empty or labels[run.name] in grids:
            continue
        row = rows.iloc[-1]
        value = f", {metric} {row[metric]:.3g}" if metric in row and pd.notna(row[metric]) else ""
        label = labels[run.name]
        grids[label] = (row.gmacs, f"{label}\n{row.gmacs:.3g} gmacs{value}", image)
    return [(caption, image) for _, caption, image in sorted(grids.values())]


def last_sample(run: RunRecord) -> Path | None:
    """Returns the newest sample grid of a run, if it has any."""
    images = sorted((run.folder / "samples").glob("step_*.png"))
    return images[-1] if images else None


def draw_samples(folder: StudyFolder) -> Path | None:
    """Writes `charts/samples.png`, every grid of the gallery with its caption, if there are any."""
    grids = [(caption, _scaled(Image.open(image).convert("RGB"))) for caption, image in gallery(folder)]
    if not grids:
        return None
    width, height = (max(image.size[axis] for _, image in grids) for axis in (0, 1))
    columns = min(4 if height > 0.3 * width else 2, len(grids))
    step_x, step_y = max(width, CELL) + GAP, 2 * LINE + height + GAP
    rows = -(-len(grids) // columns)
    picture = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    for i, (caption, image) in enumerate(grids):
        x, y = GAP + i % columns * step_x, GAP + i // columns * step_y
        for line, text in enumerate(caption.split("\n")):
            canvas.text((x, y + line * LINE), text, fill="#222222", font=font)
        picture.paste(image, (x, y + 2 * LINE))
    file, buffer = make_folder(folder.path / "charts") / "samples.png", io.BytesIO()
    picture.save(buffer, format="png")
    write_atomic(file, buffer.getvalue())
    return file


def _scaled(image: Image.Image) -> Image.Image:
    """Returns the image about as wide as a cell; small ones grow by a whole factor, to keep pixels square."""
    if image.width > CELL:
        return image.resize((CELL, max(1, round(image.height * CELL / image.width))), Image.Resampling.BOX)
    factor = round(CELL / image.width)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
