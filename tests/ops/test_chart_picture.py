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
