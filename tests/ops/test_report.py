"""The report: complete for a whole run, honest for half a run, one file that asks for nothing from outside."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from infra.store import LocalStore
from ops import report
from ops.demo_web import serve
from ops.errors import UsageError
from ops.ingest import ingest_shard
from ops.report import Bars, Chart, Fact, ReportData, Section, Sheet, Table
from ops.sheets import png
from ops.status import status
from ops.trained import write_checkpoint
from tests.pairs import generated, pending, plan


class Page(HTMLParser):
    """Tags that are open at the end or close another, every attribute, and the text."""

    VOID = frozenset({"meta", "img", "br", "line"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def dot(red: int) -> bytes:
    return png(np.full((4, 4, 3), (red, 0, 0), np.uint8))


def train_rows(first: int, last: int) -> list[dict]:
    rows = [
        {"kind": "train", "step": s, "loss": 8.0 / s, "nats_per_dim": 8.0 / s, "gradient_norm": 1.0, "usage": None}
        for s in range(first, last + 1, 10)
    ]
    image = {"right": 3.0 / last, "shuffled": 4.0 / last, "none": 3.5 / last}
    measured = {"psnr_db": float(last), "image_nats_per_code": image, "information_gain_nats_per_code": 1.0 / last}
    return [*rows, {"kind": "evaluation", "step": last, "on": "held_out", "pictures": 7, **measured}]


def trained(run: Path, name: str, steps: list[int]) -> None:
    store, before = LocalStore(run / name), 0
    for step in steps:
        weights = run / "weights"
        weights.write_bytes(f"{name} {step}".encode())
        write_checkpoint(
            store, step, step, {"model.safetensors": weights}, train_rows(before + 10, step), dot(step % 256), 3
        )
        before = step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run as the stages leave it: real pairs with real rejections, checkpoints, pictures, a summary."""
    run = tmp_path_factory.mktemp("run")
    pairs = LocalStore(run / "pairs")
    with serve(run) as web:
        bad = [(f"{web.url}/hostile/{kind}/1", f"a caption of {kind}") for kind in ("missing", "html", "broken")]
        plan(pairs, run / "list.tsv", [*generated(web.url, range(12)), *bad], pairs_per_shard=8)
        for task in pending(pairs):
            assert ingest_shard(task).state == "committed"
    trained(run, "tokenizer", [50, 100])
    trained(run, "model", list(range(20, 260, 20)))
    pictures = LocalStore(run / "pictures")
    pictures.put("sheet.png", dot(9))
    pictures.put("sheet.json", json.dumps({"prompts": ["a cat <b>", "a cat <b>", "a dog"], "seed": 3}).encode())
    (run / "settings.toml").write_text('[dvae]\nimage_size = 32  # "pixels" <&>\n')
    summary = {
        "title": "a small run",
        "seed": 3,
        "device": "two cores",
        "licence": "drawn by <us>",
        "samples": {"concept_at_5": {"held_out": 0.91, "shifted_captions": 0.05}},
        "seconds": {"ingest": {"wall": 60.0, "cpu": 30.0}, "model": {"wall": 120.0, "cpu": 150.0}},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def written(run: Path) -> str:
    assert report.write_run_report(str(run)) == f"{run}/report.html"
    return (run / "report.html").read_text(encoding="utf-8")


# --- a run ---


def test_the_report_of_a_run_shows_every_part(run):
    data = report.report_of_run(str(run))
    titles = [section.title for section in data.sections]
    assert titles == ["Pictures from prompts", "Scores", "Pairs", "The tokenizer", "The transformer"]
    page = Page(written(run))
    for expected in (
        "a small run",
        "Seed 3 · two cores · 3.0 min wall time · 3.0 min CPU time",
        "a cat <b> · a dog. seed 3",
        "concept at 5 · held out",
        "0.91",
        'image_size = 32  # "pixels" <&>',
        "drawn by <us>",
        "after 240 updates",
    ):
        assert expected in page.text, expected


def test_the_funnel_is_what_status_counts(run):
    told = status(LocalStore(run / "pairs"))["pairs"]
    (section,) = [s for s in report.report_of_run(str(run)).sections if s.title == "Pairs"]
    (bars,) = section.bars
    counts = {label: count for label, count, _ in bars.rows}
    assert counts.pop("planned") == told["planned"] == 15
    assert counts.pop("kept") == told["kept"] == 12
    assert counts == told["rejected"] == {"http_4xx": 1, "not_an_image": 1, "http_5xx": 1}
    assert {label: note for label, _, note in bars.rows}["http_5xx"] == "transient"


def test_pairs_of_shards_that_are_not_committed_stand_in_the_funnel(tmp_path):
    pairs = LocalStore(tmp_path / "pairs")
    with serve(tmp_path) as web:
        plan(pairs, tmp_path / "list.tsv", generated(web.url, range(10)), pairs_per_shard=6)
        assert ingest_shard(pending(pairs)[0]).state == "committed"
    data = report.report_of_run(str(tmp_path))
    counts = {label: count for label, count, _ in data.sections[0].bars[0].rows}
    assert counts["kept"] + counts["in shards not committed"] == counts["planned"] == 10
    assert any("run the same command again" in step for step in data.next_steps)


def test_the_strip_holds_at_most_eight_sheets_with_the_first_and_the_last(run):
    sections = {section.title: section for section in report.report_of_run(str(run)).sections}
    captions = [sheet.caption for sheet in sections["The transformer"].strip]
    assert len(captions) == 8
    assert (captions[0], captions[-1]) == ("after 20 updates", "after 240 updates")
    assert [sheet.png for sheet in sections["The tokenizer"].strip] == [dot(50), dot(100)]


def test_the_next_steps_name_commands_for_this_run(run):
    steps = " ".join(report.report_of_run(str(run)).next_steps)
    assert f"armchair rerun {run}/pairs" in steps  # one rejection is transient
    assert f"armchair generate {run}/model" in steps
    assert f"--preset {run}/settings.toml" in steps


def test_a_run_that_stands_half_way_has_a_report_of_what_is_there(tmp_path):
    trained(tmp_path, "tokenizer", [50])
    data = report.report_of_run(str(tmp_path))
    assert [section.title for section in data.sections] == ["The tokenizer"]
    assert "after 50 updates" in Page(report.render(data)).text


def test_a_directory_without_a_run_is_refused_in_words(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        report.write_run_report(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_second_report_replaces_the_first(run):
    first = written(run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"title": "another title"}))
    second = written(run)
    (run / "summary.json").write_text(json.dumps(summary))
    assert "another title" in second
    assert written(run) == first


# --- the page ---


def test_the_page_refers_to_nothing_outside_and_has_no_script(run):
    page = written(run)
    outward = [a for a in Page(page).attributes if a[1] in ("src", "href", "srcset", "data", "action", "xlink:href")]
    assert outward
    assert all(value.startswith("data:image/png;base64,") for _, _, value in outward)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe|<object", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_text_of_users_is_escaped_wherever_it_stands():
    evil = '<img src=x onerror="alert(1)">&\'"'
    section = Section(
        title=evil,
        text=evil,
        facts=[Fact(evil, evil, evil)],
        bars=[Bars(evil, [(evil, 3, evil)])],
        sheets=[Sheet(evil, dot(1))],
        strip=[Sheet(evil, dot(2)), Sheet(evil, dot(3))],
        strip_title=evil,
        charts=[Chart(evil, {evil: [(0, 1), (1, 2)]}, evil)],
        tables=[Table(evil, [evil], [[evil]]), Table(evil, [evil], [[evil]], is_folded=True)],
    )
    page = report.render(ReportData(evil, evil, [section], [evil], evil, evil))
    assert "<img src=x" not in page
    assert {tag for tag, name, _ in Page(page).attributes if name.startswith("on")} == set()
    assert html.escape("<img src=x") in page


def test_an_empty_report_is_a_whole_page(tmp_path):
    report.write_report(tmp_path / "empty.html", ReportData("nothing yet", "", []))
    assert "nothing yet" in Page((tmp_path / "empty.html").read_text()).text


# --- curves ---


def test_a_chart_holds_the_points_where_they_belong():
    drawn = report.draw_chart(Chart("t", {"a": [(0, 0.0), (50, 5.0), (100, 10.0)], "b": [(0, 10.0), (100, 0.0)]}))
    assert drawn.lines == (("a", "0.0,170.0 160.0,85.0 320.0,0.0", "10"), ("b", "0.0,0.0 320.0,170.0", "0"))
    assert drawn.y_ticks[0] == (170.0, "0")
    assert drawn.y_ticks[-1] == (0.0, "10")
    assert not drawn.is_cut


def test_the_first_moments_do_not_flatten_a_curve():
    points = [(0, 10_000.0), *((step, 1 + 1 / step) for step in range(1, 200))]
    drawn = report.draw_chart(Chart("loss", {"training": points}))
    assert drawn.is_cut
    heights = [float(point.split(",")[1]) for point in drawn.lines[0][1].split()]
    assert heights[0] < 0  # above the area, where the page cuts it off
    assert max(heights[2:]) - min(heights[2:]) > 0.5 * drawn.height


def test_noise_is_not_cut_off():
    rng = np.random.default_rng(0)
    assert not report.draw_chart(Chart("n", {"a": list(enumerate(rng.normal(size=500)))})).is_cut


@pytest.mark.parametrize("points", [[], [(0, float("nan"))], [(3, 2.0)], [(0, 2.0), (1, 2.0)], [(0, 0.0), (1, 0.0)]])
def test_a_curve_without_extent_is_drawn_or_left_out(points):
    page = Page(report.render(ReportData("t", "", [Section("s", charts=[Chart("c", {"a": points})])])))
    drawn = [value for tag, name, value in page.attributes if (tag, name) == ("polyline", "points")]
    assert len(drawn) == (1 if any(np.isfinite(y) for _, y in points) else 0)
    assert not [value for value in drawn if "nan" in value or "inf" in value]


def test_thinning_keeps_the_mean_and_the_last_point():
    points = [(float(x), float(x % 7)) for x in range(1001)]
    thin = report.thinned(points, 300)
    assert len(thin) <= 300
    assert thin[-1] == points[-1]
    assert np.mean([y for _, y in thin]) == pytest.approx(np.mean([y for _, y in points]), rel=0.02)


def test_metrics_become_one_chart_a_number_with_training_and_evaluation_together():
    rows = [
        {"kind": "evaluation", "step": 0, "on": "held_out", "pictures": 3, "loss": 9.0},
        {"kind": "train", "step": 10, "loss": 5.0, "own_number": 1.0, "usage": None},
        {
            "kind": "evaluation", "step": 10, "on": "held_out", "pictures": 3, "loss": 6.0,
            "image_nats_per_code": {"right": 1.0, "none": 2.0},
        },
    ]  # fmt: skip
    charts = {chart.title: chart.curves for chart in report.charts_of(rows)}
    assert list(charts) == ["Objective", "Picture, nats a code", "own number"]
    assert charts["Objective"] == {"held out": [(0, 9.0), (10, 6.0)], "training": [(10, 5.0)]}
    assert charts["Picture, nats a code"] == {"held out, right": [(10, 1.0)], "held out, none": [(10, 2.0)]}
