"""The page: one file that asks for nothing from outside, and text of users that stays text."""

from __future__ import annotations

import base64
import html
import io
import re

import numpy as np
from PIL import Image

from ops.charts import Chart
from ops.funnel import Example, Host
from ops.marks import Mark
from ops.report_page import (
    PICTURE_BYTES,
    Cause,
    Changed,
    Fact,
    Funnel,
    ReportData,
    Section,
    Sheet,
    Stage,
    Step,
    Table,
    render,
    write_report,
)
from ops.sheets import png
from tests.ops.page_parts import Page, dot


def whole(text: str) -> ReportData:
    """A report with every part there is, all of this text."""
    mark = Mark(text, "bad", text, text, 1, 2.0, (text,))
    causes = [Cause(text, 2, text, kind, [Example(text, text, text)]) for kind in ("policy", "permanent", "transient")]
    section = Section(
        title=text,
        text=text,
        problems=[text],
        facts=[Fact(text, text, text)],
        marks=[mark],
        funnel=Funnel(9, 3, causes, [Example(text, text, jpeg=dot(4))], [Host(text, 5, 2, text, text)], 4, text),
        sheets=[Sheet(text, dot(1))],
        strip=[Sheet(text, dot(2)), Sheet(text, dot(3))],
        strip_title=text,
        charts=[Chart(text, {text: [(0, 1), (1, 2)]}, text, text, [mark])],
        more_charts=[Chart(text, {text: [(0, 1), (1, 2)]}, text)],
        tiles=[Sheet(text, dot(5))],
        tables=[Table(text, [text, text], [[text, text]]), Table(text, [text], [[text]], is_folded=True)],
        changed={text: [Changed(text, text, text)]},
        folded={text: text},
    )
    stage = Stage(text, "done", text, text, 0.5)
    return ReportData(text, text, [section, section], [stage], [Step(text, text)], text)


def test_text_of_users_is_escaped_wherever_it_stands():
    evil = '<img src=x onerror="alert(1)">&\'"'
    page = render(whole(evil))
    assert "<img src=x" not in page
    assert {tag for tag, name, _ in Page(page).attributes if name.startswith("on")} == set()
    assert html.escape("<img src=x") in page


def test_the_page_refers_to_nothing_outside_and_has_no_script():
    page = render(whole("a run"))
    outward = [a for a in Page(page).attributes if a[1] in ("src", "href", "srcset", "data", "action", "xlink:href")]
    assert {value.split(",")[0] for _, name, value in outward if name == "src"} == {"data:image/png;base64"}
    assert all(value.startswith("#") for _, name, value in outward if name == "href")
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe|<object", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_an_empty_report_is_a_whole_page(tmp_path):
    write_report(tmp_path / "empty.html", ReportData("nothing yet", "", []))
    assert "nothing yet" in Page((tmp_path / "empty.html").read_text()).text


def test_a_large_picture_is_stored_again_smaller():
    noise = png(np.random.default_rng(0).integers(0, 255, (700, 2800, 3), np.uint8))
    page = render(ReportData("t", "", [Section("s", sheets=[Sheet("large", noise), Sheet("small", dot(1))])]))
    large, small = (base64.b64decode(value) for value in re.findall(r'src="data:image/\w+;base64,([^"]*)"', page))
    assert Image.open(io.BytesIO(large)).size == (1400, 350)
    assert len(large) < len(noise) / 4
    assert len(noise) > PICTURE_BYTES
    assert small == dot(1)


def test_the_funnel_adds_up_on_the_page():
    causes = [Cause("timeout", 3, "too slow", "transient"), Cause("aspect", 1, "too narrow", "policy")]
    funnel = Funnel(10, 4, causes)
    assert funnel.judged == 8
    text = " ".join(Page(render(ReportData("t", "", [Section("s", funnel=funnel)]))).text.split())
    assert "planned 10 100 %" in text
    assert "judged kept, or left out for a reason 8 80.0 %" in text
    assert "timeout too slow 3 30.0 %" in text
