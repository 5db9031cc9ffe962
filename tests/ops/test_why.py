"""`why` tells the whole life of a pair: every station as it is on disk, and what is not there or can't be read."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.store import LocalStore, open_store
from ops import find_pairs
from ops.demo_web import DemoWeb, serve
from ops.drops import add_drops, drop_rows, list_drops, read_drop_list
from ops.errors import UsageError
from ops.ingest import ingest_shard, start_pairs
from ops.plan import Columns, PlanSettings, extend_plan, pair_uid
from ops.reader import codes_reader, pictures_reader
from ops.shards import read_receipts, read_table
from ops.snapshot import read_snapshot
from ops.trained import latest_checkpoint, load_tokenizer, tokenizer_digest, write_checkpoint
from ops.training import prepare
from ops.why import has_problem, why
from pipelines.show import show_why
from tests.ops.conftest import Learned, MakePairs
from tests.pairs import FILTERS, PICTURE, generated, pending, plan, reruns
from tests.small_runs import TOKENIZER_TRAINING, TOKENS, tokenizer_job, write_pair_shard

RUN = ("pairs", "tokenizer", "tokens", "model")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[DemoWeb]:
    with serve(tmp_path) as web:
        yield web


def url(number: int) -> str:
    """The URL of a drawn pair of tests/small_runs.py."""
    return f"http://example.org/{number}"


def life(target: str, *places: Path | str, into: str | None = None) -> dict[str, Any]:
    """The one pair that is found."""
    told = why(target, [str(place) for place in places], into)
    assert told["more"] == 0
    (one,) = told["pairs"]
    assert show_why(told)
    return one


def begun(location: Path) -> LocalStore:
    """PAIRS as ingestion begins it."""
    start_pairs(store := LocalStore(location), PlanSettings(), FILTERS, PICTURE)
    return store


def copied(learned: Learned, to: Path) -> Path:
    """A copy of the learned run, to be changed."""
    for name in RUN:
        shutil.copytree(getattr(learned, name), to / name)
    return to


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# --- a pair of a whole run -------------------------------------------------------------------------------------------
def test_a_kept_pair_is_told_from_its_row_to_the_models_that_drew_it(learned: Learned) -> None:
    told = life(url(0), learned.pairs.parent)
    assert (told["uid"], told["caption"], told["key"]) == (f"{0:032x}", "a red square", "000000000")
    assert (told["shard"]["shard"], told["shard"]["row"], told["shard"]["is_committed"]) == (0, 0, True)
    assert (told["status"]["status"], told["status"]["generation"], told["drops"]) == ("success", 0, [])
    stored = read_table(open_store(str(learned.pairs)), read_receipts(open_store(str(learned.pairs)))[0]).to_pylist()[0]
    picture = told["picture"]
    assert (picture["member"], picture["offset"]) == ("000000000.jpg", stored["tar_offset"])
    jpeg = Path(picture["path"]).read_bytes()
    assert jpeg == (learned.pairs / picture["tar"]).read_bytes()[picture["offset"] :][: stored["jpg_size"]]
    (codes,) = told["codes"]
    assert [crop["k"] for crop in codes["crops"]] == [0, 1]
    assert [(model["stage"], model["included"]) for model in told["models"]] == [
        ("tokenizer", True),
        ("transformer", True),
    ]
    assert told["files"][-1] == f"why-{told['uid'][:12]}/sheet.png"
    assert all(Path(path).is_file() for path in told["files"])


def test_the_pictures_are_the_crop_that_was_encoded_and_what_its_codes_say(learned: Learned) -> None:
    import torch

    (codes,) = life(url(3), learned.pairs, learned.tokens)["codes"]
    dvae, _ = load_tokenizer(str(learned.tokens))
    table = pq.read_table(learned.tokens / codes["file"]).to_pylist()
    for crop in codes["crops"]:
        (row,) = [row for row in table if (row["uid"], row["k"]) == (f"{3:032x}", crop["k"])]
        assert {name: crop[name] for name in ("x", "y", "side")} == row["crop"]
        image_BCHW = torch.from_numpy(pixels(crop["crop_path"]).copy()).permute(2, 0, 1)[None].float() / 255
        assert dvae.encode(image_BCHW)[0].tolist() == row["codes"]
        drawn_CHW = dvae.decode(torch.tensor([row["codes"]]))[0].clamp(0, 1)
        wanted = drawn_CHW.mul(255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels(crop["path"]), wanted)
    boxes = [(crop["x"], crop["y"], crop["side"]) for crop in codes["crops"]]
    assert boxes[0] != boxes[1]
    assert not np.array_equal(*(pixels(crop["crop_path"]) for crop in codes["crops"]))


def test_how_often_a_pair_was_drawn_is_what_the_readers_gave(learned: Learned) -> None:
    tokens, pairs = open_store(str(learned.tokens)), open_store(str(learned.pairs))
    seen: dict[str, Counter[str]] = {}
    last: dict[tuple[str, str], int] = {}
    for stage, into in (("tokenizer", learned.tokenizer), ("transformer", learned.model)):
        snapshot = read_snapshot(open_store(str(into)))
        checkpoint = latest_checkpoint(open_store(str(into)))
        assert checkpoint is not None
        digest = tokenizer_digest(str(learned.tokens))
        reader: Any = (
            pictures_reader(pairs, snapshot, 0) if stage == "tokenizer" else codes_reader(tokens, snapshot, 0, digest)
        )
        rows = list(reader.rows(0, checkpoint.cursor))
        seen[stage] = Counter(row.uid for row in rows)
        last |= {(stage, row.uid): row.position // 8 + 1 for row in rows}
    numbers = (0, 1, 11, 25, 41, 62)
    assert {seen[stage][f"{number:032x}"] for number in numbers for stage in seen} == {2, 3}
    for number in numbers:
        uid = f"{number:032x}"
        for model in life(url(number), learned.pairs.parent)["models"]:
            stage = model["stage"]
            assert (model["drawn"], model["last_step"]) == (seen[stage][uid], last[stage, uid])
            assert (model["split"], model["weight"], model["dropped"]) == ("train", 1.0, False)


def test_a_thinned_pair_is_drawn_in_the_epochs_that_its_weight_leaves(make_pairs: MakePairs, tmp_path: Path) -> None:
    """And in a shard of several groups of rows."""
    pairs, into = make_pairs(rows=300, weight=0.5), tmp_path / "tokenizer"
    prepare(tokenizer_job(pairs, into))
    (tmp_path / "weights").write_bytes(b"weights")
    write_checkpoint(LocalStore(into), 150, 1200, {"model.safetensors": tmp_path / "weights"}, [], None, 1)
    reader = pictures_reader(open_store(str(pairs)), read_snapshot(LocalStore(into)), TOKENIZER_TRAINING.seed)
    last = {row.uid: row.position // 8 + 1 for row in reader.rows(0, 1200)}
    seen = Counter(row.uid for row in reader.rows(0, 1200))
    numbers = (0, 2, 285, 290, 345, 590, 596)
    for number in numbers:
        (model,) = life(url(number), pairs, into)["models"]
        uid = f"{number:032x}"
        assert (model["drawn"], model["last_step"], model["epochs"]) == (seen[uid], last.get(uid), 2.86)
    assert {seen[f"{number:032x}"] for number in numbers} == {0, 1, 3}


def test_a_held_out_pair_is_told_as_never_trained_on(learned: Learned) -> None:
    told = life(url(7), learned.pairs.parent)
    assert told["split"] == "held_out"
    for model in told["models"]:
        assert (model["included"], model["split"]) == (True, "held_out")
        assert "drawn" not in model


def test_a_rejected_pair_ends_with_its_reason_and_has_no_picture(learned: Learned) -> None:
    told = life(url(4), learned.pairs.parent)
    assert (told["status"]["status"], told["status"]["class"]) == ("timeout", "transient")
    assert (told["picture"], told["codes"], told["files"]) == (None, [], [])
    assert [model["reason"] for model in told["models"]] == [
        "it was timeout in that generation",
        "it had no codes in that generation",
    ]
    assert list(Path().iterdir()) == []


def test_a_pair_that_where_does_not_select_says_so(learned: Learned, tmp_path: Path) -> None:
    into = tmp_path / "blue"
    prepare(tokenizer_job(learned.pairs, into, replace(TOKENIZER_TRAINING, where={"colour": "blue"})))
    assert life(url(2), learned.pairs, into)["models"][0]["included"]
    assert life(url(0), learned.pairs, into)["models"][0]["reason"] == "`where` does not select colour 'red'"


# --- what came later -------------------------------------------------------------------------------------------------
def test_a_superseded_generation_is_told_against_the_newest(learned: Learned, tmp_path: Path) -> None:
    run = copied(learned, tmp_path / "run")
    write_pair_shard(run / "pairs", 0, list(range(40)), generation=1)
    told = life(url(0), run)
    assert (told["status"]["generation"], told["status"]["before"]) == (1, [{"generation": 0, "status": "success"}])
    (codes,) = told["codes"]
    assert (codes["pairs_generation"], codes["newest_pairs_generation"]) == (0, 1)
    tokenizer, model = told["models"]
    assert (tokenizer["included"], tokenizer["generation"], tokenizer["newest_generation"]) == (True, 0, 1)
    assert (model["included"], model["generation"], model["newest_generation"]) == (True, 0, 0)
    text = show_why(why(url(0), [str(run)]))
    assert "made from generation 0 (the newest is 1: `armchair tokenize" in text
    assert "of generation 0 of the shard (the newest is 1)" in text


def test_a_dropped_pair_names_the_list_and_is_drawn_at_most_as_often(learned: Learned, tmp_path: Path) -> None:
    run = copied(learned, tmp_path / "run")
    before = life(url(0), run)["models"]
    stages = [LocalStore(run / name) for name in ("pairs", "tokens")]
    for store in stages:
        add_drops(store, drop_rows([(bytes(16), None), ((1).to_bytes(16), None)], "takedown"))
        add_drops(store, drop_rows([((9).to_bytes(16), None)], "duplicate", [(2).to_bytes(16)]))
    (key,) = (key for key in list_drops(stages[0]) if len(read_drop_list(stages[0], key)) == 2)
    told = life(url(0), run)
    assert told["drops"] == [
        {"stage": f"{run}/{name}", "list": key, "kind": "takedown"} for name in ("pairs", "tokens")
    ]
    assert {drop["stays"] for drop in life(f"{9:032x}", run)["drops"]} == {f"{2:032x}"}
    assert f"a copy of {2:032x}" in show_why(why(f"{9:032x}", [str(run)]))
    assert [(model["drawn"], model["dropped"]) for model in told["models"]] == [(m["drawn"], True) for m in before]
    assert "drawn at most" in show_why(why(url(0), [str(run)]))
    # A training that starts now knows the list from its first position on.
    into = tmp_path / "again"
    prepare(tokenizer_job(run / "pairs", into))
    (tmp_path / "weights").write_bytes(b"weights")
    write_checkpoint(LocalStore(into), 70, 560, {"model.safetensors": tmp_path / "weights"}, [], None, 1)
    assert life(url(0), run / "pairs", into)["models"][0]["drawn"] == 0
    assert life(url(2), run / "pairs", into)["models"][0]["drawn"] > 0


def test_codes_that_were_not_made_yet_and_a_shard_that_came_after_the_snapshot(
    learned: Learned, tmp_path: Path
) -> None:
    run = copied(learned, tmp_path / "run")
    write_pair_shard(run / "pairs", 2, list(range(80, 90)))
    told = life(url(80), run)
    assert told["codes"][0]["generation"] is None
    assert [model["included"] for model in told["models"]] == [False, False]
    assert all("has no shard 2, which was committed later" in model["reason"] for model in told["models"])


# --- from the list on ------------------------------------------------------------------------------------------------
def test_the_list_line_leads_to_the_row_of_the_list(tmp_path: Path, web: DemoWeb) -> None:
    """In CSV with line ends in quotes it is the line that the row starts on; in Parquet the number of the row."""
    pairs = generated(web.url, range(6))
    quoted = ["url,caption", *(f'{address},"{caption},\nand a second line"' for address, caption in pairs[:3])]
    (tmp_path / "a.csv").write_text("\n".join(quoted) + "\n")
    columns = {"url": [address for address, _ in pairs[3:]], "caption": [caption for _, caption in pairs[3:]]}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    store = begun(tmp_path / "pairs")
    lists = [str(tmp_path / "a.csv"), str(tmp_path / "b.parquet")]
    extend_plan(store, lists, PlanSettings(pairs_per_shard=4), FILTERS, Columns())
    for task in pending(store):
        assert ingest_shard(task).state == "committed"
    for number, (address, caption) in enumerate(pairs):
        told = life(address, store.location)
        line = told["list"]
        assert line["instalment"] == 0
        if number < 3:
            assert line["list"] == lists[0]
            assert (tmp_path / "a.csv").read_text().splitlines()[line["line"] - 1].startswith(f"{address},")
        else:
            assert line["list"] == lists[1]
            assert columns["caption"][line["row"] - 1] == caption
        assert (told["attempts"]["count"], told["attempts"]["last"]["state"]) == (1, "committed")
        assert told["status"]["http_status"] == 200
        assert told["picture"]["sent"]["sha256"] is not None


def test_a_rerun_and_a_shard_that_is_not_committed_are_told_with_their_attempts(tmp_path: Path, web: DemoWeb) -> None:
    late = (f"{web.url}/hostile/heals_later/1", "a picture that comes late")
    store = begun(tmp_path / "pairs")
    plan(store, tmp_path / "list.tsv", [*generated(web.url, range(7)), late], pairs_per_shard=4)
    uid = pair_uid(late[0].encode(), late[1].encode()).hex()
    before = life(uid, store.location)
    assert (before["status"]["status"], before["status"]["planned"]) == (None, None)
    assert (before["attempts"]["count"], before["shard"]["is_committed"], before["picture"]) == (0, False, None)
    assert "not asked for yet" in show_why(why(uid, [store.location]))
    shard = before["shard"]["shard"]
    (task,) = [task for task in pending(store) if task.shard == shard]
    ingest_shard(task)
    while tasks := reruns(store):
        for task in tasks:
            ingest_shard(task)
    told = life(uid, store.location)
    assert told["status"]["before"][0] == {"generation": 0, "status": "http_5xx"}
    assert (told["status"]["status"], told["status"]["generation"]) == ("success", 1)
    assert (told["attempts"]["count"], told["attempts"]["last"]["generation"]) == (2, 1)
    (other,) = {task.shard for task in pending(store)}
    assert other != shard


def test_the_error_of_the_last_attempt_is_told(tmp_path: Path, web: DemoWeb) -> None:
    store = begun(tmp_path / "pairs")
    plan(store, tmp_path / "list.tsv", generated(web.url, range(3)))
    (task,) = pending(store)
    (tmp_path / "pairs" / "data").write_text("a file where the directory should be")
    with pytest.raises(OSError, match="data"):
        ingest_shard(task)
    last = life(generated(web.url, range(1))[0][0], store.location)["attempts"]["last"]
    assert last["state"] == "failed"
    assert "data" in last["error"]


# --- which pair ------------------------------------------------------------------------------------------------------
def test_a_url_with_several_captions_tells_each_and_a_doubled_pair_twice(tmp_path: Path, web: DemoWeb) -> None:
    address = f"{web.url}/generated/1.jpg"
    store = begun(tmp_path / "pairs")
    pairs = [(address, "a red kite"), (address, "a kite over a hill"), (address, "a kite over a hill")]
    plan(store, tmp_path / "list.tsv", [*pairs, *generated(web.url, range(2, 5))])
    for task in pending(store):
        ingest_shard(task)
    told = why(address, [store.location])
    captions = Counter(one["caption"] for one in told["pairs"])
    assert captions == {"a red kite": 1, "a kite over a hill": 2}
    assert sorted(one["list"]["line"] for one in told["pairs"]) == [2, 3, 4]
    (files,) = (one["files"] for one in told["pairs"] if one["files"])  # the URL was fetched once
    assert all(Path(path).is_file() for path in files)
    assert Counter(one["status"]["status"] for one in told["pairs"]) == {"success": 1, "url_duplicate": 2}


def test_a_uid_may_be_cut_where_that_is_unique(make_pairs: MakePairs, tmp_path: Path) -> None:
    store = begun(tmp_path / "pairs")
    plan(store, tmp_path / "list.tsv", generated("http://127.0.0.1:9", range(3)))
    uid = pair_uid(*(part.encode() for part in generated("http://127.0.0.1:9", range(1))[0])).hex()
    assert life(uid[:8].upper(), store.location)["uid"] == uid
    with pytest.raises(UsageError, match="may be cut to 8 digits, not to fewer"):
        why(uid[:7], [store.location])
    with pytest.raises(UsageError, match=r"begins the uid of several pairs: 0{32}, .*Give more digits"):
        why("00000000", [str(make_pairs())])


def test_a_pair_is_found_in_its_codes_alone_by_uid_and_not_by_url(learned: Learned) -> None:
    told = life(f"{3:032x}", learned.tokens, learned.model)
    assert (told["pairs"], told["url"], told["caption"]) == (None, None, "a yellow square")
    (codes,) = told["codes"]
    assert len(codes["crops"]) == TOKENS.crops
    assert told["models"][0]["included"]
    with pytest.raises(UsageError, match="Codes have no URLs: name the pairs too"):
        why(url(3), [str(learned.tokens)])
    with pytest.raises(UsageError, match="A trained stage has no pairs: name the pairs too"):
        why(f"{3:032x}", [str(learned.model)])


def test_models_of_other_pairs_are_not_mixed_up_with_these(learned: Learned, make_pairs: MakePairs) -> None:
    """Shard and key are the same there; the receipts that the snapshots name are not."""
    told = life(url(40), make_pairs(shards=1, rows=41), learned.tokens, learned.tokenizer, learned.model)
    assert told["codes"][0]["generation"] is None
    assert [model["included"] for model in told["models"]] == [False, False]


def test_what_is_not_found_is_told_with_what_was_searched_and_what_is_near(
    learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(learned.pairs.parent)
    with pytest.raises(UsageError, match=rf"none of 80 pairs in {run}/pairs. Near it are http://example.org/5 "):
        why("http://example.com/5", [run])
    with pytest.raises(UsageError, match="the uid of none of 80 pairs"):
        why("feedbeef" * 4, [run])
    with pytest.raises(UsageError, match="as the list has it, before redirects"):
        why("ftp:elsewhere", [run])
    with pytest.raises(UsageError, match="holds no stage and no run"):
        why(url(0), [str(tmp_path)])
    assert why(url(0), [run, f"{run}/pairs", f"{run}/tokens/"])["pairs"][0]["models"][1]["included"], "each stage once"


def test_a_search_for_a_uid_reads_only_files_that_can_hold_it(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(shards=4, rows=10)
    read: list[int] = []
    row_groups = find_pairs.row_groups

    def counted(store: LocalStore, key: str) -> Iterator[Any]:
        for first, group, take in row_groups(store, key):
            yield first, group, lambda columns=None, take=take, key=key: read.append(key) or take(columns)

    monkeypatch.setattr(find_pairs, "row_groups", counted)
    life(f"{25:032x}", pairs)
    assert len(set(read)) == 1


# --- damage ----------------------------------------------------------------------------------------------------------
def test_what_is_damaged_says_so_in_its_place_and_the_rest_is_told(learned: Learned, tmp_path: Path) -> None:
    run = copied(learned, tmp_path / "run")
    tar = run / "pairs" / read_receipts(open_store(str(run / "pairs")))[0].files["tar"].key
    tar.write_bytes(b"\0" * tar.stat().st_size)
    (run / "model" / "snapshot.json").write_text('{"format": 9}')
    told = why(url(0), [str(run)])
    (one,) = told["pairs"]
    assert "a JPEG of" in one["picture"]["problem"]
    assert "has format 9" in one["models"][1]["problem"]
    assert one["models"][0]["included"]
    assert len(one["codes"][0]["crops"]) == 2
    assert has_problem(told)
    assert not has_problem(why(url(0), [str(learned.pairs)]))
    assert "is damaged" in show_why(told)
