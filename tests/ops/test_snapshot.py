from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from infra.store import open_store
from ops.errors import StorageError, UnknownFormat, UsageError
from ops.shards import FileRef, read_receipt, read_receipts
from ops.snapshot import (
    SNAPSHOT,
    Group,
    Groups,
    PinnedShard,
    Snapshot,
    read_snapshot,
    source_fingerprint,
    take_snapshot,
)
from tests.ops.conftest import Learned, MakePairs
from tests.small_runs import write_pair_shard


def test_a_snapshot_is_read_back_as_it_was_written(make_pairs: MakePairs, tmp_path: Path) -> None:
    snapshot = take_snapshot(open_store(str(make_pairs())), "pictures", {"colour": ["red", "blue"]})
    into = open_store(str(tmp_path / "into"))
    into.put(SNAPSHOT, snapshot.to_json())
    assert read_snapshot(into) == snapshot
    assert read_snapshot(into).digest == snapshot.digest


def test_the_text_of_a_snapshot_is_that_of_earlier_versions() -> None:
    ref, groups = FileRef("data/0.tar", 9, "ab"), Groups.of([Group(0, 256, 250, 6), Group(256, 4, 3, 1)])
    shard = PinnedShard(7, 1, "cd", {"tar": ref}, groups)
    where: dict[str, str | list[str]] = {"shards": [], "receipt": 'a "shards":[] within'}
    snapshot = Snapshot("pictures", where, 1, None, (shard, replace(shard, shard=8)), ("drops/1",))
    files = '{"tar":{"bytes":9,"key":"data/0.tar","sha256":"ab"}}'
    one, other = '"first":0,"held_out":6,"rows":256,"train":250', '"first":256,"held_out":1,"rows":4,"train":3'
    two = f'[{{"crop":0,{one}}},{{"crop":0,{other}}}]'
    pinned = [f'{{"files":{files},"generation":1,"groups":{two},"receipt":"cd","shard":{n}}}' for n in (7, 8)]
    assert snapshot.to_json().decode() == (
        '{"crops":1,"drops":["drops/1"],"format":1,"kind":"pictures",'
        f'"shards":[{pinned[0]},{pinned[1]}],"tokenizer":null,'
        '"where":{"receipt":"a \\"shards\\":[] within","shards":[]}}'
    )


def test_reading_a_snapshot_takes_no_more_than_a_few_kilobytes_a_shard(tmp_path: Path) -> None:
    shards = tuple(
        PinnedShard(
            number,
            0,
            f"{number:064x}",
            {name: FileRef(f"data/{number:05d}.{name}", 1 << 28, f"{number:064x}") for name in ("tar", "parquet")},
            Groups.of((first, 256, 250, 6, 0) for first in range(0, 40 * 256, 256)),
        )
        for number in range(1000)
    )
    into = open_store(str(tmp_path))
    into.put(SNAPSHOT, Snapshot("pictures", {}, 1, None, shards, ()).to_json())
    text = (tmp_path / SNAPSHOT).stat().st_size
    tracemalloc.start()
    snapshot = read_snapshot(into)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert snapshot.shards == shards
    print(f"{held / 1000:.0f} bytes a shard are held, {most / 1000:.0f} at most while {text / 1000:.0f} are read")
    assert held / 1000 < 3000
    assert most < held + 2.5 * text  # bytes and str; not ten times as much in dicts


def test_a_snapshot_counts_what_where_and_split_select(make_pairs: MakePairs) -> None:
    store = open_store(str(make_pairs()))
    everything = take_snapshot(store, "pictures", {})
    kept = sum(receipt.kept for receipt in read_receipts(store).values())
    assert everything.rows() + everything.rows("held_out") == kept == 64
    by_colour = [take_snapshot(store, "pictures", {"colour": c}) for c in ("red", "green", "blue", "yellow")]
    assert sum(snapshot.rows() for snapshot in by_colour) == everything.rows()
    two = take_snapshot(store, "pictures", {"colour": ["red", "green"]})
    assert two.rows() == by_colour[0].rows() + by_colour[1].rows()


def test_the_crops_of_a_picture_count_once(learned: Learned) -> None:
    pictures = take_snapshot(open_store(str(learned.pairs)), "pictures", {})
    codes = take_snapshot(open_store(str(learned.tokens)), "codes", {})
    assert (codes.rows(), codes.rows("held_out")) == (pictures.rows(), pictures.rows("held_out"))


def test_a_column_that_the_lists_did_not_have_is_refused_with_those_they_had(make_pairs: MakePairs) -> None:
    with pytest.raises(UsageError, match=r"no column 'color'.*colour"):
        take_snapshot(open_store(str(make_pairs())), "pictures", {"color": "red"})


def test_a_selection_of_nothing_is_refused(make_pairs: MakePairs) -> None:
    with pytest.raises(UsageError, match="no pictures to train on where"):
        take_snapshot(open_store(str(make_pairs())), "pictures", {"colour": "mauve"})


def test_a_place_that_is_no_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no pairs"):
        source_fingerprint(open_store(str(tmp_path / "nowhere")))


def test_the_fingerprint_of_a_stage_stays_while_it_grows(make_pairs: MakePairs) -> None:
    pairs = make_pairs(shards=1)
    before = source_fingerprint(open_store(str(pairs)))
    write_pair_shard(pairs, 1, list(range(40, 60)))
    assert source_fingerprint(open_store(str(pairs))) == before


def test_a_shard_of_another_tokenizer_among_the_codes_is_named(learned: Learned, tmp_path: Path) -> None:
    tokens = shutil.copytree(learned.tokens, tmp_path / "tokens")
    store = open_store(str(tokens))
    receipt = read_receipt(store, 1, 0)
    other = replace(receipt, made_from=receipt.made_from | {"tokenizer": "c" * 64})
    store.put(other.key, other.to_json(), if_absent=False)
    with pytest.raises(StorageError, match="shard 00001 were made by tokenizer cccc"):
        take_snapshot(open_store(str(tokens)), "codes", {})


def test_a_snapshot_of_a_later_version_is_refused_in_words(learned: Learned, tmp_path: Path) -> None:
    into = open_store(str(tmp_path / "into"))
    into.put(SNAPSHOT, json.dumps({"format": 99}).encode())
    with pytest.raises(UnknownFormat, match="99"):
        read_snapshot(into)
