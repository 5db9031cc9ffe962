from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ops import demo_web
from ops.errors import BadList, UsageError
from ops.filters import FilterSettings
from ops.forecast import HOSTS_KEPT, Hosts, Scale, bootstrap, forecast, wilson
from ops.plan import Columns, PlanSettings
from tests.pairs import FETCH, OUTAGE, PICTURE

ROWS = 1000
Pairs = list[tuple[str, str]]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[demo_web.DemoWeb]:
    with demo_web.serve(tmp_path_factory.mktemp("empty")) as server:
        yield server


@pytest.fixture(scope="module")
def seventy(web: demo_web.DemoWeb, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of which 700 of 1,000 rows are kept: 150 are missing, 100 say nothing, 50 have the URL of another."""
    good = [(f"{web.url}/generated/{i}.jpg", f"a generated picture, number {i}") for i in range(700)]
    missing = [(f"{web.url}/hostile/missing/{i}", f"a picture that is gone, number {i}") for i in range(150)]
    boilerplate = [(f"{web.url}/generated/{i}.jpg", f"IMG_{i:04d}") for i in range(1000, 1100)]
    copies = [(url, f"another caption of number {i}") for i, (url, _) in enumerate(good[:50])]
    return write(tmp_path_factory.mktemp("seventy") / "list.tsv", [*good, *missing, *boilerplate, *copies])


def write(path: Path, pairs: Pairs) -> Path:
    path.write_text("url\tcaption\n" + "".join(f"{url}\t{caption}\n" for url, caption in pairs))
    return path


def foresee(path: Path, sample: int = 100, seed: int = 0, cores: int = 4, **changed: Any) -> dict[str, Any]:
    of = {"plan": PlanSettings(), "filters": FilterSettings(min_side_px=16), "fetch": FETCH, "picture": PICTURE}
    return forecast([str(path)], sample, seed, cores, outage=OUTAGE, columns=Columns(), **(of | changed))


def is_inside(interval: dict[str, float], truth: float) -> bool:
    return interval["low"] <= truth <= interval["high"]


def test_a_known_yield_lies_in_its_interval_in_nine_of_ten_seeds(seventy: Path) -> None:
    told = [foresee(seventy, sample=200, seed=seed) for seed in range(10)]
    assert sum(is_inside(one["yield"], 0.7) for one in told) >= 9
    truths = {"http_4xx": 0.15, "caption_boilerplate": 0.1, "url_duplicate": 0.05}
    inside = [is_inside(one["reasons"][reason], truth) for one in told for reason, truth in truths.items()]
    assert sum(inside) >= 27
    assert len({one["yield"]["value"] for one in told}) > 3, "seeds draw different rows"
    for one in told:
        assert 0.08 < one["yield"]["high"] - one["yield"]["low"] < 0.15
        assert one["yield"]["value"] + sum(reason["value"] for reason in one["reasons"].values()) == pytest.approx(1)


def test_a_sample_of_all_rows_is_no_estimate_and_the_costs_are_what_was_spent(
    web: demo_web.DemoWeb, tmp_path: Path
) -> None:
    pairs = [(f"{web.url}/generated/{i}.jpg", f"a generated picture, number {i}") for i in range(30)]
    gone = [(f"{web.url}/hostile/missing/x{i}", f"a picture that is gone, number {i}") for i in range(10)]
    before = web.bytes_out()
    told = foresee(write(tmp_path / "list.tsv", [*pairs, *gone]), sample=500)
    sent = web.bytes_out() - before
    assert (told["rows"], told["sample"]) == (40, 40)
    assert told["yield"] == {"value": 0.75, "low": 0.75, "high": 0.75}
    assert told["pairs"]["value"] == 30
    assert told["bytes_in"]["low"] == told["bytes_in"]["value"] == told["bytes_in"]["high"] <= sent
    assert told["bytes_in"]["value"] == sum(len(demo_web.jpeg(i)) for i in range(30))
    assert told["cpu_hours"]["value"] * 3600 == pytest.approx(told["measured"]["cpu_s"], abs=0.01)
    assert told["hours"]["value"] == pytest.approx(told["cpu_hours"]["value"] / 4, abs=1e-6)
    assert told["bytes_stored"]["value"] > 30 * 1024
    assert told["hosts"]["value"] == told["robots_requests"]["value"] == 1
    assert list(told["languages"]) == ["en"]


def test_the_same_seed_draws_the_same_rows_and_nothing_is_left_behind(
    web: demo_web.DemoWeb, seventy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, again = ({k: foresee(seventy, 30, 5)[k] for k in ("yield", "reasons", "bytes_in")} for _ in range(2))
    assert first == again
    assert [path.name for path in tmp_path.iterdir() if "robots" not in path.name] == []


def test_copies_are_counted_though_the_sample_holds_few_of_them(web: demo_web.DemoWeb, tmp_path: Path) -> None:
    pairs = [
        (f"{web.url}/generated/{i % 200}.jpg", f"a generated picture, number {i % 200}, caption {i}")
        for i in range(800)
    ]
    path = write(tmp_path / "list.tsv", pairs)
    told = foresee(path, sample=60)
    assert is_inside(told["reasons"]["url_duplicate"], 0.75)
    assert is_inside(told["yield"], 0.25)
    every = foresee(path, sample=20, plan=PlanSettings(unique_urls=False))
    assert every["yield"]["value"] == 1


def test_an_image_server_that_is_down_is_told_as_passing_reasons(web: demo_web.DemoWeb, tmp_path: Path) -> None:
    pairs = [(f"{web.url}/hostile/broken/f{i}", f"a picture of number {i}") for i in range(5)]
    told = foresee(write(tmp_path / "list.tsv", pairs))
    assert told["transient"] == 1
    assert told["yield"]["value"] == 0


def test_sites_are_counted_exactly_when_few_and_estimated_when_many() -> None:
    few, many = Hosts(), Hosts()
    few.add([b"http://a.org/1", b"HTTP://A.org/2", b"https://a.org", b" http://a.org:81/?x", b"no url", None, b"\xff"])
    assert few.count().low == few.count().high == 3
    for start in range(0, 60_000, 6_000):  # every site twice
        many.add([b"http://%d.org/%d.jpg" % (i % 30_000, i) for i in range(start, start + 6_000)])
    found = many.count()
    assert len(many.smallest) == HOSTS_KEPT
    assert found.low < 30_000 < found.high
    assert found.high - found.low < 3_000


def test_intervals_hold_the_truth_about_as_often_as_they_promise() -> None:
    generator = np.random.default_rng(0)
    # A tenth of a list, drawn without replacement: as `forecast` draws.
    shares = [Scale(1000, 100, generator).share(n) for n in generator.hypergeometric(700, 300, 100, 2000).tolist()]
    assert 0.93 < np.mean([found.low <= 0.7 <= found.high for found in shares]) < 0.97
    drawn = generator.binomial(200, 0.7, 400)
    assert 0.93 < np.mean([(found := wilson(n, 200)).low <= 0.7 <= found.high for n in drawn]) <= 0.98
    assert wilson(0, 50).low == 0
    assert wilson(0, 50).high == pytest.approx(0.0714, abs=1e-3)
    means = [bootstrap(generator.lognormal(0, 1, 100), generator) for _ in range(40)]
    assert np.mean([found.low <= np.exp(0.5) <= found.high for found in means]) > 0.8


def test_bad_input_is_told_before_anything_is_fetched(web: demo_web.DemoWeb, tmp_path: Path) -> None:
    path = write(tmp_path / "list.tsv", [(f"{web.url}/generated/bad.jpg", "a picture")])
    with pytest.raises(UsageError, match="--sample 0"):
        foresee(path, sample=0)
    with pytest.raises(BadList, match="no such file"):
        foresee(tmp_path / "none.tsv")
    broken = write(tmp_path / "broken.tsv", [(f"{web.url}/generated/bad.jpg", "a picture\tand more")])
    with pytest.raises(BadList, match="line 2"):
        foresee(broken)
    assert "/generated/bad.jpg" not in web.counts()
