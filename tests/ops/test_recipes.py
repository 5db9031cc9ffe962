"""Recipes: written before the work, compared field by field, never reused in silence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from infra.store import LocalStore
from ops.errors import DamagedArtifact, RecipeChanged, UnknownFormat
from ops.recipes import RECIPE, canonical_json, file_sha256, parse_json, read_json, sha256, start_stage, versions

IDENTITY: dict[str, Any] = {
    "picture": {"short_side_px": 384, "sides": (1, 2)},
    "plan": {"held_out": 0.01},
    "note": None,
}
INPUTS = {"tokenizer": "abc"}


def test_the_first_start_writes_the_recipe_and_the_same_identity_resumes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    start_stage(store, "tokens", IDENTITY, INPUTS, "ways out")
    written = store.read(RECIPE)
    recipe = json.loads(written)
    assert recipe["format"] == 1
    assert recipe["stage"] == "tokens"
    assert recipe["identity"]["picture"]["short_side_px"] == 384
    assert recipe["inputs"] == INPUTS
    assert recipe["versions"] == versions()
    start_stage(store, "tokens", json.loads(json.dumps(IDENTITY)), INPUTS, "ways out")
    assert store.read(RECIPE) == written


@pytest.mark.parametrize(
    ("stage", "identity", "inputs", "change"),
    [
        ("pairs", IDENTITY, INPUTS, "  stage: was 'tokens', now 'pairs'"),
        ("tokens", IDENTITY, {"tokenizer": "abd"}, "  tokenizer: was 'abc', now 'abd'"),
        (
            "tokens",
            {**IDENTITY, "picture": {"short_side_px": 256, "sides": (1, 2)}},
            INPUTS,
            "  picture.short_side_px: was 384, now 256",
        ),
        (
            "tokens",
            {**IDENTITY, "picture": {"short_side_px": 384, "sides": (1, 3)}},
            INPUTS,
            "  picture.sides: was [1, 2], now [1, 3]",
        ),
        ("tokens", {**IDENTITY, "new": True}, INPUTS, "  new: was None, now True"),
        ("tokens", {"picture": IDENTITY["picture"]}, INPUTS, "  plan.held_out: was 0.01, now None"),
    ],
)
def test_another_identity_is_refused_field_by_field_with_the_ways_out(
    tmp_path: Path, stage: str, identity: dict[str, Any], inputs: dict[str, Any], change: str
) -> None:
    store = LocalStore(tmp_path)
    start_stage(store, "tokens", IDENTITY, INPUTS, "ways out")
    before = store.read(RECIPE)
    with pytest.raises(RecipeChanged) as raised:
        start_stage(store, stage, identity, inputs, "Use another --into.")
    assert str(raised.value).splitlines() == [
        f"{tmp_path} was made with other settings:",
        change,
        "Use another --into.",
    ]
    assert store.read(RECIPE) == before


def test_other_versions_of_libraries_are_no_other_identity(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    start_stage(store, "tokens", IDENTITY, INPUTS, "ways out")
    recipe = json.loads(store.read(RECIPE))
    recipe["versions"] = {"torch": "0.1"}
    store.put(RECIPE, json.dumps(recipe).encode(), if_absent=False)
    start_stage(store, "tokens", IDENTITY, INPUTS, "ways out")
    assert read_json(store, RECIPE)["versions"] == {"torch": "0.1"}


def test_a_recipe_holds_no_number_that_json_has_not(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        start_stage(store, "tokens", {"beta": float("nan")}, {}, "ways out")
    assert list(store.list()) == []


def test_an_unknown_format_and_a_damaged_json_are_refused_in_words(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    start_stage(store, "tokens", IDENTITY, INPUTS, "ways out")
    store.put(RECIPE, store.read(RECIPE).replace(b'"format": 1', b'"format": 2'), if_absent=False)
    with pytest.raises(UnknownFormat, match=r"recipe.json has format 2; this version of armchair reads format 1"):
        start_stage(store, "tokens", IDENTITY, INPUTS, "ways out")
    for damaged in (b"", b'{"format": 1', b"[1]", b"\xff\xfe"):
        with pytest.raises(DamagedArtifact, match=r"somewhere/recipe.json is damaged"):
            parse_json(damaged, "somewhere/recipe.json")
    with pytest.raises(FileNotFoundError):
        read_json(LocalStore(tmp_path / "nothing"), RECIPE)


def test_equal_values_give_equal_bytes_and_digests(tmp_path: Path) -> None:
    assert (
        canonical_json({"b": [1.5, None, "ü"], "a": {"y": 1, "x": 2}})
        == '{"a":{"x":2,"y":1},"b":[1.5,null,"ü"]}'.encode()
    )
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("inf")})
    data = b"some bytes" * 200_000
    (tmp_path / "file").write_bytes(data)
    assert sha256(data) == file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_versions_name_the_code_and_the_libraries_that_decide_bytes() -> None:
    assert {"armchair", "numpy", "pyarrow", "torch", "opencv-python-headless", "pillow"} <= versions().keys()
    assert all(versions().values())
