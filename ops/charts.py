"""Charts: how curves become lines, dots and ticks of a small SVG. Numbers in, places in a drawing area out.

May not live here: what is drawn (ops/report.py), what is good or bad in it (ops/marks.py), the SVG's tags and colours
(ops/report.html.j2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ops.marks import Mark

Points = Sequence[tuple[float, float]]

POINTS_A_CURVE = 300
DOTS_A_CURVE = 30
"""Curves of at most so many points show each as a dot: evaluations, where training's means are a line."""
WIDTH, HEIGHT = 320, 160
"""Units of a chart's drawing area; the page scales it."""


@dataclass(frozen=True)
class Chart:
    """Curves over one axis: name -> (x, y) points, x rising. Points that are not finite are left out.

    `good` says in a few words which direction is good. `is_log`: the y axis counts powers of ten, for numbers above 0.
    """

    title: str
    curves: Mapping[str, Points]
    x_label: str = "updates"
    good: str = ""
    marks: Sequence[Mark] = ()
    is_log: bool = False


@dataclass(frozen=True)
class Line:
    """One curve: `points` of an SVG polyline, its dots, and the text of its last value ("" on a log axis: no time)."""

    name: str
    points: str
    last: str
    dots: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class DrawnChart:
    """A chart in units of its drawing area, y downwards; ticks are (place, text).

    `marks` are (x, y, kind, text) of those marks that have a place. `is_cut`: some points lie outside the area.
    """

    lines: tuple[Line, ...] = ()
    x_ticks: tuple[tuple[float, str], ...] = ()
    y_ticks: tuple[tuple[float, str], ...] = ()
    marks: tuple[tuple[float, float, str, str], ...] = ()
    is_cut: bool = False
    width: int = WIDTH
    height: int = HEIGHT


def draw_chart(chart: Chart) -> DrawnChart:
    """Scales and thins the curves. The first moments of a training may be cut off so that the rest can be read."""
    scale = _power if chart.is_log else float
    curves = {name: [(x, scale(y)) for x, y in points] for name, points in chart.curves.items()}
    curves = {name: finite for name, points in curves.items() if (finite := _finite(points))}
    if not curves:
        return DrawnChart()
    x_low, x_high = _bounds([x for points in curves.values() for x, _ in points], cut=0.0)
    ys = sorted(y for points in curves.values() for _, y in points)
    y_low, y_high = _bounds(ys, cut=0.0 if chart.is_log else 0.02)
    y_ticks = _decades(y_low, y_high) if chart.is_log else nice_ticks(y_low, y_high)
    x_ticks = [tick for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high]
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def across(x: float) -> float:
        return round((x - x_low) / (x_high - x_low) * WIDTH, 1)

    def down(y: float) -> float:
        return round((y_high - y) / (y_high - y_low) * HEIGHT, 1)

    lines = []
    for name, points in curves.items():
        thin = [(across(x), down(y)) for x, y in thinned(points, POINTS_A_CURVE)]
        has_dots = len(points) <= DOTS_A_CURVE and not chart.is_log
        last = next(y for _, y in reversed(chart.curves[name]) if math.isfinite(scale(y)))
        text = "" if chart.is_log else number(last)
        lines.append(Line(name, " ".join(f"{x},{y}" for x, y in thin), text, tuple(thin) if has_dots else ()))
    marks = [
        (across(mark.step), min(max(down(scale(mark.value)), 0.0), float(HEIGHT)), mark.kind, mark.text)
        for mark in chart.marks
        if mark.step is not None and mark.value is not None and x_low <= mark.step <= x_high
    ]
    return DrawnChart(
        tuple(lines),
        tuple((across(tick), number(tick)) for tick in x_ticks),
        tuple((down(tick), number(10**tick if chart.is_log else tick)) for tick in y_ticks),
        tuple(marks),
        is_cut=ys[0] < y_low or ys[-1] > y_high,
    )


def _power(y: float) -> float:
    return math.log10(y) if y > 0 else math.nan


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(low), math.ceil(high)
    step = max(1, -(-(last - first) // 5))
    return [float(power) for power in range(first, last + step, step)]


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _bounds(values: Iterable[float], cut: float) -> tuple[float, float]:
    """Lowest and highest of the values, widened if they are equal.

    The outermost `cut` share at each end is left out where it would take most of the room.
    """
    ordered = sorted(values)
    skip = int(cut * len(ordered))
    low, high = ordered[skip], ordered[-1 - skip]
    if ordered[-1] - ordered[0] <= 3 * (high - low):
        low, high = ordered[0], ordered[-1]
    if low == high:
        margin = abs(low) / 10 or 1.0
        return low - margin, high + margin
    return low, high


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, in steps of 1, 2 or 5 times a power of ten.

    >>> nice_ticks(0.13, 0.92)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def thinned(points: Points, at_most: int) -> list[tuple[float, float]]:
    """At most so many points: means of equal stretches, with the last point as it is.

    >>> thinned([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0), (4, 2.0)], 3)
    [(0.5, 2.0), (2.5, 6.0), (4, 2.0)]
    """
    if len(points) <= at_most:
        return list(points)
    *before, last = points
    size = -(-len(before) // (at_most - 1))
    stretches = [before[start : start + size] for start in range(0, len(before), size)]
    return [tuple(sum(axis) / len(stretch) for axis in zip(*stretch, strict=True)) for stretch in stretches] + [last]  # type: ignore[misc]


def number(value: float) -> str:
    """A number as people read it: three digits that matter, thousands with commas.

    >>> number(0.01234), number(18.64), number(12000.0), number(-0.5), number(0.0), number(4e-5)
    ('0.0123', '18.6', '12,000', '-0.5', '0', '4e-05')
    """
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
