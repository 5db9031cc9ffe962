from __future__ import annotations

import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from ops.demo_summary import GATES, Gate
from ops.demo_web import HOSTILE
from ops.errors import UsageError
from ops.openmoji import DemoPicture
from pipelines.demo import MISBEHAVE_SHARE, _for_demo, _port, _rows, _web_server
from pipelines.settings import resolve

PICTURE = DemoPicture("1F34E.png", "red apple", "red apple", "", "", "", "train", 1.0, "core", "", "1F34E")


def test_every_way_to_misbehave_is_in_the_list_and_in_no_subset() -> None:
    pictures = [replace(PICTURE, caption=f"apple {n}") for n in range(2000)]
    extra = _rows(pictures, "http://127.0.0.1:1")[len(pictures) :]
    assert len(extra) == round(MISBEHAVE_SHARE * len(pictures))
    assert {row["url"].split("/")[4] for row in extra} == set(HOSTILE)
    assert {row["subset"] for row in extra} == {""}
    assert len({row["caption"] for row in extra}) == len(extra)


def test_the_same_directory_has_the_same_port(tmp_path: Path) -> None:
    assert _port(tmp_path) == _port(tmp_path)


def test_the_server_is_there_for_the_time_of_the_with(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("here")
    port = _port(tmp_path)
    with _web_server(tmp_path, port):
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/pictures/a.txt").read() == b"here"
        with pytest.raises(UsageError, match="is taken"), _web_server(tmp_path, port):
            pass
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/pictures/a.txt")


def test_the_demo_trains_on_the_subset_unless_told_otherwise() -> None:
    drawings = {"held": ["", "composition", "concept"]}
    assert _for_demo(resolve("demo"), seed=3).transformer_training.where == {**drawings, "subset": "core"}
    everything = _for_demo(resolve("demo", ["demo.pictures=all"]), seed=3)
    assert everything.transformer_training.where == drawings, "not on what misbehaved: it is in no gallery"
    assert everything.transformer_training.seed == everything.tokenizer_training.seed == 3


def test_a_gate_says_what_it_wants_and_refuses_what_is_no_number() -> None:
    gate = Gate(("a", "b"), at_least=0.5)
    assert gate.holds({"a": {"b": 0.5}})
    assert not gate.holds({"a": {"b": 0.49}})
    assert not gate.holds({"a": {"b": float("nan")}})
    assert str(gate) == "a.b >= 0.5"
    assert all((gate.at_least is None) != (gate.at_most is None) for gate in GATES)
