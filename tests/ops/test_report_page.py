"""The page: one file that asks for nothing from outside, text of users that stays text, and how a browser shows it."""

from __future__ import annotations

import base64
import html
import io
import re

import numpy as np
import pytest
from PIL import Image

from ops.charts import Chart
from ops.funnel import Example, Host
from ops.marks import Mark
from ops.report import report_of_run
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
from tests.browser import LOWEST_CONTRAST, opened, started_browser
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


# --- in a real browser ---

WIDTHS = (360, 1280)


@pytest.fixture(scope="module")
def browser():
    with started_browser() as started:
        yield started


@pytest.fixture(scope="module", params=["a run", "long words"])
def file(request, learned, tmp_path_factory):
    """The report of a real run, and one whose every text is a word that fits on no line."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(
        path, whole("long" * 60) if request.param == "long words" else report_of_run(str(learned.pairs.parent))
    )
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_the_page_whole_at_each_width_and_asks_for_nothing(browser, file, width):
    with opened(browser, file, width) as page:
        assert page.title()
        pictures = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
        assert len(pictures) > 4
        assert min(pictures) > 0
        assert page.evaluate("document.scrollingElement.scrollWidth") == width
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert page.evaluate("document.scrollingElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(browser, file, scheme):
    with opened(browser, file, scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        ratio, text = page.evaluate(LOWEST_CONTRAST)
        assert ratio >= 4.5, text


def test_dark_and_light_have_different_paper(browser, file):
    papers = []
    for scheme in ("light", "dark"):
        with opened(browser, file, scheme=scheme) as page:
            papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert papers == ["rgb(250, 249, 246)", "rgb(21, 23, 26)"]


def test_a_reason_opens_and_shows_its_examples_on_paper_too(browser, file):
    with opened(browser, file, 360) as page:
        first = page.locator(".funnel details").first
        assert not first.locator("li").first.is_visible()
        first.locator("summary").click()
        assert first.locator("li").first.is_visible()
        first.locator("summary").click()
        assert not first.locator("li").first.is_visible()
        page.emulate_media(media="print")
        height = page.evaluate("document.querySelector('.funnel details li').getBoundingClientRect().height")
        assert height > 10
