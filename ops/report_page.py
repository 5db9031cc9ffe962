"""The page of a report: the plain values it is made of, and how they become HTML (ops/report.html.j2).

The page is one file that refers to nothing outside: pictures are data URIs, curves are SVG, there is no script. It
follows the reader's light or dark setting, is readable at the width of a phone, and prints. May not live here: where
the values come from (ops/report.py).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
from PIL import Image

from infra.store import LocalStore
from ops.charts import Chart, draw_chart
from ops.funnel import Example, Host
from ops.marks import Mark

State = Literal["done", "under way", "unfinished", "not begun", "damaged"]

PICTURE_BYTES = 250_000
"""A larger picture is stored again as a JPEG of at most `PICTURE_PX`, so that the page stays small."""
PICTURE_PX = 1400


@dataclass(frozen=True)
class Fact:
    """One number that matters, with its unit in `value` and what it is measured on in `note`."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """A card of the way from list to pictures. `share` of 1 is done; None: there is nothing to count yet."""

    name: str
    state: State
    value: str
    note: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Cause:
    """A reason of the funnel: its count, what it means, its class (`policy`, …), and examples."""

    name: str
    count: int
    meaning: str
    kind: str
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class Funnel:
    """Pairs from planned to kept. `sampled` says what the examples and hosts were read from, `failed` is the number of
    failures there."""

    planned: int
    kept: int
    causes: Sequence[Cause]
    kept_examples: Sequence[Example] = ()
    hosts: Sequence[Host] = ()
    failed: int = 0
    sampled: str = ""

    @property
    def judged(self) -> int:
        """Pairs that are kept or have a reason."""
        return self.kept + sum(cause.count for cause in self.causes)

    def of_kind(self, kind: str) -> list[Cause]:
        """The reasons of one class, most frequent first."""
        return sorted((cause for cause in self.causes if cause.kind == kind), key=lambda cause: -cause.count)


@dataclass(frozen=True)
class Sheet:
    """A picture (PNG or JPEG) and what it shows."""

    caption: str
    picture: bytes


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. `is_folded` shows only the title until it is opened."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_folded: bool = False


@dataclass(frozen=True)
class Changed:
    """A setting whose value is not the default."""

    name: str
    value: str
    default: str


@dataclass(frozen=True)
class Step:
    """Something to do next, with the command that does it."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the page, its parts in the order of the fields.

    `problems` are lines about what could not be read. `strip` is shown side by side, to be scrolled: the same sheet at
    several times; its last sheet is also shown large, under `strip_title`. `more_charts` are folded. `folded` is text.
    """

    title: str
    text: str = ""
    problems: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    marks: Sequence[Mark] = ()
    funnel: Funnel | None = None
    sheets: Sequence[Sheet] = ()
    strip: Sequence[Sheet] = ()
    strip_title: str = ""
    charts: Sequence[Chart] = ()
    more_charts: Sequence[Chart] = ()
    tiles: Sequence[Sheet] = ()
    tables: Sequence[Table] = ()
    changed: Mapping[str, Sequence[Changed]] | None = None
    folded: Mapping[str, str] | None = None

    @property
    def id(self) -> str:
        """The name of the section in the page's address."""
        return "-".join(self.title.lower().split())


@dataclass(frozen=True)
class ReportData:
    """A whole report. `licence` stands under pictures and at the end, where they come with one."""

    title: str
    summary: str
    sections: Sequence[Section]
    stages: Sequence[Stage] = ()
    steps: Sequence[Step] = ()
    licence: str = ""

    @property
    def marks(self) -> list[tuple[Section, Mark]]:
        """What stands out: the bad marks of all sections, then the notes."""
        found = [(section, mark) for section in self.sections for mark in section.marks]
        return [pair for kind in ("bad", "note") for pair in found if pair[1].kind == kind]


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
    environment.filters["thousands"] = lambda count: f"{count:,}"
    environment.filters["percent"] = percent
    environment.filters["is_flat"] = _is_flat
    return environment.get_template("report.html.j2").render(data=data)


def percent(share: float) -> str:
    """A share as people read it; none but 0 reads as 0.

    >>> percent(0.9727), percent(0.0026), percent(0.000001), percent(1.0), percent(0.99999), percent(0.0)
    ('97.3 %', '0.26 %', '< 0.01 %', '100 %', '99.9 %', '0 %')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    if share < 0.0001:
        return "< 0.01 %"
    return f"{min(100 * share, 99.9):.{1 if share >= 0.01 else 2}f} %"


def _data_uri(picture: bytes) -> str:
    if len(picture) > PICTURE_BYTES:
        picture = _smaller(picture)
    kind = "jpeg" if picture.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode()


def _is_flat(sheet: Sheet) -> bool:
    """Whether a sheet is so wide that several are compared better one below the other."""
    with Image.open(io.BytesIO(sheet.picture)) as image:
        return image.width > 4 * image.height


def _smaller(picture: bytes) -> bytes:
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((PICTURE_PX, 10 * PICTURE_PX))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def shown_value(value: object) -> str:
    """A setting's value as TOML writes it, near enough to be read.

    >>> shown_value(True), shown_value(4e-3), shown_value((64, 128)), shown_value(None)
    ('true', '0.004', '[64, 128]', 'not set')
    """
    return "not set" if value is None else json.dumps(value, ensure_ascii=False, default=str)
