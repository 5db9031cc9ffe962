"""Charts as one picture, an SVG file of its own, for where there is no page of ours to draw them on.

May not live here: how curves become places (ops/charts.py), which charts there are (ops/report_stages.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ops.charts import HEIGHT, WIDTH, Chart, draw_chart

COLUMNS = 2
LEFT, TOP, RIGHT, BOTTOM = 52, 34, 18, 30
"""Room around a drawing area for its title and ticks; below them the names of its curves."""
NAMES, NAME_HEIGHT = 2, 16
"""Names in a line, and how high a line of them is."""
COLOURS = ("#9aa7b5", "#1f66ad", "#c2571a", "#2f8f5b", "#8a4fa3", "#b08900")
"""Those of the report: grey is training, the others are evaluations."""


def charts_svg(charts: Sequence[Chart]) -> bytes:
    """All charts in two columns, on white, readable in a light and in a dark page."""
    lines = max((-(-len(chart.curves) // NAMES) for chart in charts), default=0)
    across, down = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM + NAME_HEIGHT * lines
    width, height = COLUMNS * across, -(-len(charts) // COLUMNS) * down
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#62686f">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for place, chart in enumerate(charts):
        x, y = place % COLUMNS * across + LEFT, place // COLUMNS * down + TOP
        parts += [f'<g transform="translate({x} {y})">', *_chart(chart), "</g>"]
    return "\n".join([*parts, "</svg>"]).encode()


def _chart(chart: Chart) -> list[str]:
    drawn = draw_chart(chart)
    parts = [f'<text x="0" y="-14" font-size="14" fill="#23272c">{escape(chart.title)}</text>']
    for y, text in drawn.y_ticks:
        parts.append(f'<line x2="{WIDTH}" y1="{y}" y2="{y}" stroke="#e4e1d9"/>')
        parts.append(f'<text x="-6" y="{y + 4}" text-anchor="end">{text}</text>')
    for x, text in drawn.x_ticks:
        parts.append(f'<text x="{x}" y="{HEIGHT + 16}" text-anchor="middle">{text}</text>')
    # An inner svg cuts off what lies outside of the area, as on the page.
    parts.append(f'<svg width="{WIDTH}" height="{HEIGHT}">')
    first = 0 if any(line.name == "training" for line in drawn.lines[:1]) else 1
    names: list[str] = []
    for place, line in enumerate(drawn.lines):
        colour = COLOURS[(place + first) % len(COLOURS)]
        parts.append(f'<polyline points="{line.points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="2.6" fill="{colour}"/>' for x, y in line.dots]
        at = f'x="{place % NAMES * 11 * WIDTH // 20}" y="{HEIGHT + BOTTOM + 4 + place // NAMES * NAME_HEIGHT}"'
        name = escape(f"{line.name} {line.last}".strip())
        names.append(f'<text {at}><tspan fill="{colour}">●</tspan> {name}</text>')
    return [*parts, "</svg>", *names]
