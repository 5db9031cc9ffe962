from __future__ import annotations

from xml.etree import ElementTree

from ops.chart_picture import charts_svg
from ops.charts import HEIGHT, WIDTH, Chart

SVG = "{http://www.w3.org/2000/svg}"


def test_a_picture_of_charts_is_one_svg_with_every_curve_name_and_last_value() -> None:
    curves = {"training": [(step, 3 - step / 100) for step in range(100)], "held-out <b>": [(0, 3.0), (99, 2.5)]}
    charts = [Chart("loss & more", curves), Chart("psnr", {"held-out": [(1, 20.0), (2, 21.25)]}), Chart("none", {})]
    drawn = ElementTree.fromstring(charts_svg(charts))
    assert len(drawn.findall(f".//{SVG}polyline")) == 3
    told = " ".join("".join(text.itertext()) for text in drawn.iter(f"{SVG}text"))
    for part in ("loss & more", "training 2.01", "held-out <b> 2.5", "psnr", "held-out 21.2"):
        assert part in told
    places = [
        tuple(map(float, point.split(",")))
        for line in drawn.iter(f"{SVG}polyline")
        for point in line.get("points", "").split()
    ]
    assert all(0 <= x <= WIDTH and -1 <= y <= HEIGHT + 1 for x, y in places)
    areas = [group.get("transform") for group in drawn.findall(f"{SVG}g")]
    assert len(set(areas)) == 3
    assert int(drawn.get("height", "0")) == 2 * int(drawn[0].get("height", "0")) // 2


def test_the_names_of_many_curves_stay_within_their_chart() -> None:
    curves = {f"held-out, curve {number}": [(0, 1.0), (9, 2.0)] for number in range(5)}
    drawn = ElementTree.fromstring(charts_svg([Chart("many", curves), Chart("next", {"held-out": [(0, 1.0)]})]))
    group = drawn.find(f"{SVG}g")
    assert group is not None
    places = [
        (int(t.get("x", "")), int(t.get("y", "")))
        for t in group.findall(f"{SVG}text")
        if "curve" in "".join(t.itertext())
    ]
    assert len(set(places)) == 5
    top = float(str(group.get("transform")).split()[1].rstrip(")"))
    assert all(0 <= x <= 0.6 * WIDTH and HEIGHT < y < int(drawn.get("height", "")) - top for x, y in places)
