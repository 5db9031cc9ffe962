"""Charts: points land where they belong, and no curve is flattened, lost or drawn with what is no number."""

from __future__ import annotations

import numpy as np
import pytest

from ops.charts import Chart, draw_chart, thinned
from ops.marks import Mark
from ops.report_page import ReportData, Section, render
from tests.ops.page_parts import Page


def test_a_chart_holds_the_points_where_they_belong():
    drawn = draw_chart(Chart("t", {"a": [(0, 0.0), (50, 5.0), (100, 10.0)], "b": [(0, 10.0), (100, 0.0)]}))
    assert [(line.name, line.points, line.last) for line in drawn.lines] == [
        ("a", "0.0,160.0 160.0,80.0 320.0,0.0", "10"),
        ("b", "0.0,0.0 320.0,160.0", "0"),
    ]
    assert drawn.lines[0].dots == ((0.0, 160.0), (160.0, 80.0), (320.0, 0.0))
    assert drawn.y_ticks[0] == (160.0, "0")
    assert drawn.y_ticks[-1] == (0.0, "10")
    assert not drawn.is_cut


def test_a_mark_stands_on_its_point():
    mark = Mark("t", "bad", "here", step=50, value=5.0)
    drawn = draw_chart(Chart("t", {"a": [(0, 0.0), (100, 10.0)]}, marks=[mark, Mark("t", "note", "nowhere")]))
    assert drawn.marks == ((160.0, 80.0, "bad", "here"),)


def test_a_log_axis_counts_powers_of_ten_and_leaves_out_nothing_else_than_zero():
    drawn = draw_chart(Chart("t", {"a": [(1, 10.0), (2, 1.0), (3, 0.1), (4, 0.0)]}, is_log=True))
    assert [text for _, text in drawn.y_ticks] == ["0.1", "1", "10"]
    assert drawn.lines[0].points == "0.0,0.0 160.0,80.0 320.0,160.0"


def test_the_first_moments_do_not_flatten_a_curve():
    points = [(0, 10_000.0), *((step, 1 + 1 / step) for step in range(1, 200))]
    drawn = draw_chart(Chart("loss", {"training": points}))
    assert drawn.is_cut
    heights = [float(point.split(",")[1]) for point in drawn.lines[0].points.split()]
    assert heights[0] < 0  # above the area, where the page cuts it off
    assert max(heights[2:]) - min(heights[2:]) > 0.5 * drawn.height


def test_noise_is_not_cut_off():
    rng = np.random.default_rng(0)
    assert not draw_chart(Chart("n", {"a": list(enumerate(rng.normal(size=500)))})).is_cut


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("points", [[], [(0, float("nan"))], [(3, 2.0)], [(0, 2.0), (1, 2.0)], [(0, 1.0), (1, 1.0)]])
def test_a_curve_without_extent_is_drawn_or_left_out(points, is_log):
    page = Page(render(ReportData("t", "", [Section("s", charts=[Chart("c", {"a": points}, is_log=is_log)])])))
    drawn = [value for tag, name, value in page.attributes if (tag, name) == ("polyline", "points")]
    assert len(drawn) == (1 if any(np.isfinite(y) for _, y in points) else 0)
    assert not [value for value in drawn if "nan" in value or "inf" in value]


def test_thinning_keeps_the_mean_and_the_last_point():
    points = [(float(x), float(x % 7)) for x in range(1001)]
    thin = thinned(points, 300)
    assert len(thin) <= 300
    assert thin[-1] == points[-1]
    assert np.mean([y for _, y in thin]) == pytest.approx(np.mean([y for _, y in points]), rel=0.02)
