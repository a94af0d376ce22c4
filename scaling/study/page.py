"""The report as one HTML file: text, interactive charts, tables and pictures. It fetches nothing."""

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import vl_convert

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1c1c1c; background: #fff;
  max-width: 58rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.question { color: #444; margin: 0 0 1rem; }
.answer { background: #f4f6f8; border-left: 4px solid #31688e; padding: .7rem 1rem; }
.answer p { margin: .35rem 0; }
.answer p:first-child { font-weight: 600; }
.caveats { background: #fdf6ec; border-left: 4px solid #b3420a; margin: 1rem 0;
  padding: .7rem 1rem .7rem 2rem; }
.caveats li { margin: .25rem 0; }
.chart { width: 100%; }
.note { color: #555; font-size: .88rem; margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e2e2e2; }
th { color: #444; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr.bad td { color: #8a3006; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 15rem), 1fr)); gap: 1rem; }
.grids figure { margin: 0; }
.grids img { width: 100%; image-rendering: pixelated; border: 1px solid #ddd; box-sizing: border-box; }
.grids figcaption { font-size: .85rem; color: #444; }
pre { background: #f4f4f4; padding: .7rem 1rem; overflow-x: auto; font-size: .85rem; }
</style>
<script>$script</script>
</head>
<body>
$body
<script>
const charts = $charts;
// On a narrow screen, legends go below the charts.
const below = {orient: "bottom", columns: 2, layout: {bottom: {direction: "vertical", anchor: "start"}}};
const narrow = {legend: below, title: {limit: innerWidth - 90}};
for (const [name, spec] of Object.entries(charts)) {
  const config = spec.width == "container" && innerWidth < 640 ? narrow : {};
  vegaEmbed("#" + name, spec, {actions: false, renderer: "svg", config: config});
}
</script>
</body>
</html>
""")


def page(title: str, body: str, charts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the whole file. `charts` are Vega-Lite specifications by the id of their place in `body`."""
    specs = json.dumps(charts, allow_nan=False).replace("</", "<\\/")
    script = _vega().replace("</script", "<\\/script")
    return PAGE.substitute(title=escape(title), script=script, body=body, charts=specs)


@functools.cache
def _vega() -> str:
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def paragraphs(texts: Sequence[str]) -> str:
    """Returns texts as HTML paragraphs."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def chart_place(name: str, still: Path, words: str) -> str:
    """Returns the place of an interactive chart, with its still for readers without scripts."""
    image = f'<img src="{data_uri(still)}" alt="{escape(words)}" style="width:100%">'
    return f'<div class="scroll"><div class="chart" id="{name}"></div></div><noscript>{image}</noscript>'


def data_uri(image: Path) -> str:
    """Returns a PNG file as a URI that holds it."""
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], bad: Sequence[bool]) -> str:
    """Returns a table that scrolls sideways by itself; `bad` rows stand out."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [
        f"<tr{' class=bad' * is_bad}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row, is_bad in zip(rows, bad, strict=True)
    ]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
