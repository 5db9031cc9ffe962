"""report.html: what a run did and what came of it, on one page that needs nothing else.

Lives here: the plain values that a report is made of, how they are read from a RUN directory, how a curve becomes
lines of an SVG. The page itself is ops/report.html.j2. May not live here: computing a score, drawing a sheet.

The page refers to nothing outside: pictures are data URIs, curves are SVG, there is no script. It follows the
reader's light or dark setting and is readable at the width of a phone.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from infra.store import LocalStore, Store, join, open_store
from ops.errors import UsageError
from ops.reasons import Reason, is_transient, reason_class
from ops.status import status
from ops.trained import latest_checkpoint, read_metrics

Points = Sequence[tuple[float, float]]

REPORT = "report.html"
SHEETS_IN_STRIP = 8
PICTURES_AT_MOST = 12
PROMPTS_AT_MOST = 4
"""More prompts than this are counted under a sheet, not listed: they stand in the sheet itself."""
POINTS_A_CURVE = 300
CHART_WIDTH, CHART_HEIGHT = 320, 170
"""Units of a chart's drawing area; the page scales it."""

TITLES = {
    "loss": "Objective",
    "nats_per_dim": "Distortion + β·KL, nats a dimension",
    "distortion_nats": "Distortion, nats a picture",
    "kl_nats": "KL, nats a picture",
    "usage": "KL of the mean code use to uniform, nats",
    "gradient_norm": "Norm of the gradient",
    "psnr_db": "PSNR, dB",
    "bits_per_dim": "Bits a dimension, discretised",
    "perplexity": "Perplexity of the codes",
    "used_fraction": "Share of the codebook in use",
    "hard_minus_relaxed_nats_per_dim": "Hard minus relaxed codes, nats a dimension",
    "image_nats_per_code": "Picture, nats a code",
    "text_nats_per_token": "Caption, nats a token",
    "information_gain_nats_per_code": "What the caption tells, nats a code",
    "steps_per_s": "Updates a second",
    "waited_share": "Share of time that waited for data",
    "learning_rate": "Learning rate",
}
"""Charts in their order on the page. A number of the metrics that has no title here comes after these, by its name."""
NOT_CHARTED = {"step", "kind", "pictures", "tau", "kl_nats_per_picture", "hard_nats_per_dim", "relaxed_nats_per_dim"}


# --- what a report is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """One number that matters, with its unit in `value` and what it is measured on in `note`."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Counts as bars, for instance pairs by reason. Each row is (label, count, note)."""

    title: str
    rows: Sequence[tuple[str, int, str]]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis: name -> (x, y) points, x rising. Points that are not finite are left out."""

    title: str
    curves: Mapping[str, Points]
    x_label: str = "updates"


@dataclass(frozen=True)
class Sheet:
    """A picture (PNG) and what it shows."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. `is_folded` shows only the title until it is opened."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_folded: bool = False


@dataclass(frozen=True)
class Section:
    """One part of the page. `strip` is shown side by side, to be scrolled: the same sheet at several times.

    Its last sheet is also shown large, under `strip_title`.
    """

    title: str
    text: str = ""
    facts: Sequence[Fact] = ()
    bars: Sequence[Bars] = ()
    sheets: Sequence[Sheet] = ()
    strip: Sequence[Sheet] = ()
    strip_title: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class ReportData:
    """A whole report. `licence` stands under the pictures' section and at the end, where pictures come with one."""

    title: str
    summary: str
    sections: Sequence[Section]
    next_steps: Sequence[str] = ()
    licence: str = ""
    settings: str = ""
    """The resolved settings as TOML."""


# --- the page --------------------------------------------------------------------------------------------------------


def write_report(path: Path, data: ReportData) -> None:
    """Writes the page, whole or not at all."""
    store = LocalStore(path.absolute().parent)
    store.put(path.name, render(data).encode(), if_absent=False)


def render(data: ReportData) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["drawn"] = draw_chart
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.get_template("report.html.j2").render(data=data)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


@dataclass(frozen=True)
class DrawnChart:
    """A chart in units of its drawing area, y downwards: lines as `points` of an SVG polyline, ticks as (place, text).

    `is_cut`: some points lie above or below the area.
    """

    lines: tuple[tuple[str, str, str], ...]
    """(name, points, text of the last value)"""
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    is_cut: bool
    width: int = CHART_WIDTH
    height: int = CHART_HEIGHT


def draw_chart(chart: Chart) -> DrawnChart:
    """Scales and thins the curves. The first moments of a training may be cut off so that the rest can be read."""
    curves = {name: _finite(points) for name, points in chart.curves.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return DrawnChart((), (), (), False)
    x_low, x_high = _bounds([x for points in curves.values() for x, _ in points], cut=0.0)
    ys = sorted(y for points in curves.values() for _, y in points)
    y_low, y_high = _bounds(ys, cut=0.02)
    y_ticks = [tick for tick in nice_ticks(y_low, y_high)]
    x_ticks = [tick for tick in nice_ticks(x_low, x_high) if x_low <= tick <= x_high]
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def across(x: float) -> float:
        return round((x - x_low) / (x_high - x_low) * CHART_WIDTH, 1)

    def down(y: float) -> float:
        return round((y_high - y) / (y_high - y_low) * CHART_HEIGHT, 1)

    lines = []
    for name, points in curves.items():
        thin = thinned(points, POINTS_A_CURVE)
        lines.append((name, " ".join(f"{across(x)},{down(y)}" for x, y in thin), number(points[-1][1])))
    return DrawnChart(
        tuple(lines),
        tuple((across(tick), number(tick)) for tick in x_ticks),
        tuple((down(tick), number(tick)) for tick in y_ticks),
        is_cut=ys[0] < y_low or ys[-1] > y_high,
    )


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


# --- a run -----------------------------------------------------------------------------------------------------------


def write_run_report(run: str) -> str:
    """Reads RUN as it stands, writes RUN/report.html, returns where that is. Raises UsageError if there is no run."""
    data = report_of_run(run)
    open_store(run).put(REPORT, render(data).encode(), if_absent=False)
    return join(run, REPORT)


def report_of_run(run: str) -> ReportData:
    """What a RUN directory tells, finished or not: a stage that is not there yet is said so.

    Scores, a licence line (`licence`) and the kind of run (`title`) come from summary.json where there is one.
    Raises UsageError for a directory without any stage.
    """
    store = open_store(run)
    summary = _json(store, "summary.json")
    pairs, next_steps = _pairs_section(run)
    sections = [
        _pictures_section(store),
        _scores_section(summary),
        pairs,
        _trained_section(
            run, "tokenizer", "The tokenizer", _TOKENIZER_TEXT, "Originals, and below each its reconstruction"
        ),
        _trained_section(run, "model", "The transformer", _TRANSFORMER_TEXT, "Samples with their prompts"),
    ]
    there = [section for section in sections if section is not None]
    if not there:
        raise UsageError(f"{run} holds no run.", "`armchair build LIST --into RUN` or `armchair demo` makes one.")
    settings = _text(store, "settings.toml")
    if latest_checkpoint(open_store(join(run, "model"))) is not None:
        next_steps.append(f'Draw something: armchair generate {join(run, "model")} "a prompt" -n 9')
    if settings:
        next_steps.append(
            "Train longer, or at another size: the same command with --into another directory, --preset "
            f"{join(run, 'settings.toml')} and --set, for instance --set transformer_training.steps=10000. "
            "armchair settings names every value."
        )
    return ReportData(
        title=str(summary.get("title", f"armchair · {Path(run).name}")),
        summary=_lead(summary),
        sections=there,
        next_steps=next_steps,
        licence=str(summary.get("licence", "")),
        settings=settings,
    )


_TOKENIZER_TEXT = (
    "A discrete variational autoencoder turns a picture into a grid of codes and back. What it loses here, the "
    "transformer can't bring back: look at the pictures and, below each, what is left of it in codes."
)
_TRANSFORMER_TEXT = (
    "A transformer reads a caption and predicts the codes one after the other. If the captions tell it something, the "
    "right caption's curve lies below the shuffled one's."
)


def _lead(summary: Mapping[str, Any]) -> str:
    parts = [f"Seed {summary['seed']}" if "seed" in summary else "", str(summary.get("device", ""))]
    for clock, name in (("wall", "wall time"), ("cpu", "CPU time")):
        seconds = _seconds(summary.get("seconds", {}), clock)
        if seconds:
            parts.append(f"{seconds / 60:.1f} min {name}")
    return " · ".join(part for part in parts if part)


def _seconds(value: Any, clock: str) -> float:
    """The sum over stages of {stage: {"wall", "cpu"}}; a stage named "total" is that sum already."""
    stages = value if isinstance(value, dict) else {}
    of_stages = {name: part[clock] for name, part in stages.items() if isinstance(part, dict) and clock in part}
    return float(of_stages.get("total", sum(of_stages.values())))


def _pictures_section(store: Store) -> Section | None:
    # Sheets only: the single pictures of a prompt lie one directory deeper.
    keys = [e.key for e in store.list("pictures/") if e.key.endswith(".png") and e.key.count("/") == 1]
    if not keys:
        return None
    sheets = []
    for key in keys[:PICTURES_AT_MOST]:
        beside = _json(store, key.removesuffix(".png") + ".json")
        sheets.append(Sheet(_picture_caption(key, beside), store.read(key)))
    left_out = f" {len(keys) - PICTURES_AT_MOST} more lie in pictures/." if len(keys) > PICTURES_AT_MOST else ""
    return Section("Pictures from prompts", f"Drawn by the transformer, code by code.{left_out}", sheets=sheets)


def _picture_caption(key: str, beside: Mapping[str, Any]) -> str:
    prompts = list(dict.fromkeys(map(str, beside.get("prompts") or filter(None, [beside.get("prompt")]))))
    told = " · ".join(prompts) if len(prompts) <= PROMPTS_AT_MOST else f"{len(prompts)} prompts"
    parts = [Path(key).stem.replace("-", " ").replace("_", " "), told]
    if "seed" in beside:
        parts.append(f"seed {beside['seed']}")
    return ". ".join(part for part in parts if part)


def _scores_section(summary: Mapping[str, Any]) -> Section | None:
    parts = {name: value for name, value in summary.items() if isinstance(value, dict)}
    if not parts:
        return None
    tables = [
        Table(name, ("", "value"), _flat(value), is_folded=name in ("seconds", "pairs", "retrieval"))
        for name, value in parts.items()
    ]
    return Section("Scores", "From summary.json.", tables=tables)


def _flat(value: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, part in value.items():
        label = f"{above}{str(name).replace('_', ' ')}"
        if isinstance(part, dict):
            rows += _flat(part, f"{label} · ")
        else:
            rows.append(
                (label, number(part) if isinstance(part, int | float) and not isinstance(part, bool) else str(part))
            )
    return rows


def _pairs_section(run: str) -> tuple[Section | None, list[str]]:
    location = join(run, "pairs")
    try:
        told = status(open_store(location))
    except UsageError:
        return None, []
    pairs, shards = told["pairs"], told["shards"]
    rejected = sorted(pairs["rejected"].items(), key=lambda item: -item[1])
    waiting = pairs["planned"] - pairs["kept"] - sum(pairs["rejected"].values())
    rows = [("planned", pairs["planned"], ""), ("kept", pairs["kept"], "")]
    rows += [(reason, count, str(reason_class(Reason(reason)))) for reason, count in rejected]
    if waiting:
        rows.append(("in shards not committed", waiting, ""))
    facts = [
        Fact("pairs kept", f"{pairs['kept']:,}", f"of {pairs['planned']:,} planned"),
        Fact("shards committed", f"{shards['committed']:,}", f"of {shards['planned']:,}"),
        Fact("stored", f"{told['bytes'] / 1e6:,.1f} MB", "pictures and their tables"),
    ]
    next_steps = []
    if shards["committed"] < shards["planned"]:
        next_steps.append("Some shards are not committed: run the same command again, it does only what is missing.")
    transient = sum(count for reason, count in rejected if is_transient(reason))
    if transient:
        next_steps.append(f"Ask again for the {transient:,} pairs that may come now: armchair rerun {location}")
    text = "Each planned pair is kept or has one reason. Transient reasons may pass when the pair is asked for again."
    return Section("Pairs", text, facts=facts, bars=[Bars("Pairs by reason", rows)]), next_steps


def _trained_section(run: str, name: str, title: str, text: str, strip_title: str) -> Section | None:
    store = open_store(join(run, name))
    checkpoint = latest_checkpoint(store)
    if checkpoint is None:
        return None
    rows = read_metrics(store)
    last: dict[str, Any] = next((row for row in reversed(rows) if row["kind"] == "evaluation"), {})
    return Section(
        title,
        text,
        facts=[Fact("updates", f"{checkpoint.step:,}", f"model {checkpoint.digest[:12]}"), *_evaluation_facts(last)],
        strip=_strip(store, checkpoint.step),
        strip_title=strip_title,
        charts=charts_of(rows),
    )


def _evaluation_facts(row: Mapping[str, Any]) -> list[Fact]:
    on = str(row.get("on", "")).replace("_", " ")
    note = f"{row['pictures']} {on} pictures" if "pictures" in row else on
    names = ("psnr_db", "bits_per_dim", "perplexity", "image_nats_per_code", "information_gain_nats_per_code")
    facts = []
    for name in names:
        value = row.get(name)
        if isinstance(value, dict):
            value = value.get("right")
        if isinstance(value, int | float):
            facts.append(Fact(TITLES[name], number(value), note))
    return facts


def _strip(store: Store, last_step: int) -> list[Sheet]:
    """Sheets of at most eight checkpoints, evenly over the training, the first and the last among them."""
    found = {int(Path(entry.key).stem): entry.key for entry in store.list("sheets/") if entry.key.endswith(".png")}
    steps = sorted(step for step in found if step <= last_step)
    if len(steps) > SHEETS_IN_STRIP:
        gaps = SHEETS_IN_STRIP - 1
        steps = [steps[round(place * (len(steps) - 1) / gaps)] for place in range(SHEETS_IN_STRIP)]
    return [Sheet(f"after {step:,} updates", store.read(found[step])) for step in steps]


def charts_of(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One chart for each number of the metrics rows, training and evaluation together, in the order of TITLES.

    A number that is a table of its own (nats under three captions) gives one curve for each entry.
    """
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}

    def add(chart: str, curve: str, step: float, value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            curves.setdefault(chart, {}).setdefault(curve, []).append((step, value))

    for row in rows:
        of = "training" if row["kind"] == "train" else str(row.get("on", "evaluation")).replace("_", " ")
        for name, value in row.items():
            if name in NOT_CHARTED:
                continue
            if isinstance(value, dict):
                for part, number_of_part in value.items():
                    add(name, f"{of}, {part}", row["step"], number_of_part)
            else:
                add(name, of, row["step"], value)
    order = [name for name in TITLES if name in curves] + sorted(curves.keys() - TITLES.keys())
    return [Chart(TITLES.get(name, name.replace("_", " ")), curves[name]) for name in order]


def _text(store: Store, key: str) -> str:
    try:
        return store.read(key).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _json(store: Store, key: str) -> dict[str, Any]:
    text = _text(store, key)
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}
