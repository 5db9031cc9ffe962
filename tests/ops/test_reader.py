from __future__ import annotations

import doctest
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops.reader
import ops.seeds
from infra.store import open_store
from ops.drops import add_drops, drop_rows, url_hash
from ops.errors import DamagedArtifact, StorageError
from ops.reader import Order, Prefetch, codes_reader, pictures_reader
from ops.seeds import derived_share
from ops.shards import read_receipts
from ops.snapshot import Snapshot, take_snapshot
from tests.ops.conftest import Learned, MakePairs
from tests.small_runs import write_pair_shard


@pytest.mark.parametrize("module", [ops.reader, ops.seeds])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any),
    seed=st.integers(0, 5),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_row_once_and_touches_a_window_of_groups_at_a_time(
    sizes: list[int], seed: int, window: int, epoch: int
) -> None:
    order = Order(sizes, seed, window)
    positions = range(epoch * order.rows, (epoch + 1) * order.rows)
    places = [order.at(position) for position in positions]
    assert [order.position(place) for place in places] == list(positions)
    assert Counter((place.group, place.row) for place in places) == Counter(
        (group, row) for group, size in enumerate(sizes) for row in range(size)
    )
    assert {place.epoch for place in places} == {epoch}
    # A group is opened once: it never comes back after more than `window` others were seen since its first row.
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, place in enumerate(places):
        first.setdefault(place.group, at)
        last[place.group] = at
    for at in range(len(places)):
        assert sum(first[group] <= at <= last[group] for group in first) <= window


def test_a_position_means_the_same_whatever_was_read_before() -> None:
    sizes = [5, 3, 8, 1, 4]
    walked = Order(sizes, seed=3, window_groups=2)
    in_turn = [walked.at(position) for position in range(100)]
    jumps = np.random.default_rng(0).permutation(100)
    jumped = Order(sizes, seed=3, window_groups=2)
    assert all(jumped.at(int(position)) == in_turn[position] for position in jumps)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def walk(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = Order([20, 20, 20], seed, 2)
        return [(p.group, p.row) for p in map(order.at, range(60 * epoch, 60 * epoch + 60))]

    walks = [walk(0, 0), walk(0, 1), walk(1, 0)]
    assert all(a != b for i, a in enumerate(walks) for b in walks[i + 1 :])


def test_a_window_of_one_group_still_shuffles_within_it() -> None:
    rows = [Order([50], 0, 1).at(position).row for position in range(50)]
    assert rows != sorted(rows)


def _pictures(pairs: Path, seed: int = 0) -> ops.reader.Reader[bytes]:
    store = open_store(str(pairs))
    return pictures_reader(store, take_snapshot(store, "pictures", {}), seed)


def test_pictures_are_those_of_the_tar_and_held_out_ones_stay_out(make_pairs: MakePairs) -> None:
    pairs = make_pairs()
    reader = _pictures(pairs)
    rows = list(reader.rows(0, reader.rows_per_epoch))
    held_out = list(reader.held_out())
    expected = {}
    for receipt in read_receipts(open_store(str(pairs))).values():
        tar = (pairs / receipt.files["tar"].key).read_bytes()
        for row in pq.read_table(pairs / receipt.files["parquet"].key).to_pylist():
            if row["status"] == "success":
                jpeg = tar[row["tar_offset"] : row["tar_offset"] + row["jpg_size"]]
                expected[row["uid"]] = (row["split"], row["caption"], jpeg)
    assert len(rows) == len({row.uid for row in rows}) == reader.rows_per_epoch
    assert {row.uid for row in rows} == {uid for uid, (split, _, _) in expected.items() if split == "train"}
    assert {row.uid for row in held_out} == {uid for uid, (split, _, _) in expected.items() if split == "held_out"}
    for row in rows + held_out:
        assert (row.caption, row.payload) == expected[row.uid][1:]


def test_two_workers_read_together_what_one_reads(make_pairs: MakePairs) -> None:
    pairs = make_pairs()
    one = [(row.position, row.uid) for row in _pictures(pairs).rows(0, 96)]
    parts = [_pictures(pairs), _pictures(pairs)]
    two = []
    for start in range(0, 96, 16):  # batches of 16, each worker its half
        for rank, reader in enumerate(parts):
            two += [(row.position, row.uid) for row in reader.rows(start + 8 * rank, start + 8 * rank + 8)]
    assert two == one


def test_memory_is_two_windows_of_groups(make_pairs: MakePairs) -> None:
    pairs = make_pairs(shards=6, rows=20)
    store = open_store(str(pairs))
    reader = pictures_reader(store, take_snapshot(store, "pictures", {}), seed=0, window_groups=2)
    for start in range(0, 3 * reader.rows_per_epoch, 8):
        list(reader.rows(start, start + 8))
        assert len(reader._loaded) <= 4


def test_weight_thins_by_a_hash_of_uid_and_epoch_and_shifts_no_position(make_pairs: MakePairs) -> None:
    whole = _pictures(make_pairs(name="whole"))
    thinned = _pictures(make_pairs(name="thinned", weight=1 / 3))
    assert whole.rows_per_epoch == thinned.rows_per_epoch
    stop = 30 * whole.rows_per_epoch
    every = {row.position: row.uid for row in whole.rows(0, stop)}
    some = {row.position: row.uid for row in thinned.rows(0, stop)}
    assert some.items() <= every.items()
    for position, uid in every.items():
        assert (position in some) == (derived_share("weight", uid, position // whole.rows_per_epoch) < 1 / 3)
    assert len(some) / len(every) == pytest.approx(1 / 3, abs=0.03)


def test_a_drop_list_makes_holes_and_shifts_no_position(make_pairs: MakePairs) -> None:
    pairs = make_pairs()
    store = open_store(str(pairs))
    snapshot = take_snapshot(store, "pictures", {})
    before = {row.position: row.uid for row in pictures_reader(store, snapshot, 0).rows(0, 200)}
    gone = sorted(set(before.values()))[:7]
    add_drops(store, drop_rows([(bytes.fromhex(uid), None) for uid in gone], "takedown"))
    reader = pictures_reader(store, snapshot, 0)
    after = {row.position: row.uid for row in reader.rows(0, 200)}
    assert after == {position: uid for position, uid in before.items() if uid not in gone}
    dropped_too = next(row.uid for row in reader.held_out())
    add_drops(store, drop_rows([(bytes.fromhex(dropped_too), None)], "duplicate", [bytes(16)]))
    assert dropped_too not in {row.uid for row in pictures_reader(store, snapshot, 0).held_out()}


def test_a_url_that_is_down_is_a_hole_also_in_a_shard_that_came_later(make_pairs: MakePairs) -> None:
    pairs = make_pairs(shards=1, rows=20)
    store = open_store(str(pairs))
    add_drops(store, drop_rows([(None, url_hash("http://example.org/23"))], "takedown"))
    write_pair_shard(pairs, 1, list(range(20, 40)))
    snapshot = take_snapshot(store, "pictures", {})
    reader = pictures_reader(store, snapshot, 0)
    uids = {row.uid for row in [*reader.rows(0, reader.rows_per_epoch), *reader.held_out()]}
    assert f"{23:032x}" not in uids
    assert len(uids) == snapshot.rows() + snapshot.rows("held_out") - 1


def _codes(learned: Learned) -> tuple[Snapshot, ops.reader.Reader[ops.reader.Codes]]:
    store = open_store(str(learned.tokens))
    snapshot = take_snapshot(store, "codes", {})
    assert snapshot.tokenizer is not None
    return snapshot, codes_reader(store, snapshot, 0, snapshot.tokenizer)


def test_epoch_e_reads_crop_e_mod_k(learned: Learned) -> None:
    snapshot, reader = _codes(learned)
    stored: dict[tuple[str, int], list[int]] = {}
    for receipt in read_receipts(open_store(str(learned.tokens))).values():
        for row in pq.read_table(learned.tokens / receipt.files["parquet"].key).to_pylist():
            stored[row["uid"], row["k"]] = row["codes"]
    rows = reader.rows_per_epoch
    assert snapshot.crops == 2
    assert rows == snapshot.rows()
    for row in reader.rows(0, 4 * rows):
        assert row.payload.tolist() == stored[row.uid, row.position // rows % 2]


def test_codes_of_another_tokenizer_are_refused(learned: Learned) -> None:
    store = open_store(str(learned.tokens))
    with pytest.raises(StorageError, match="not by bbbb"):
        codes_reader(store, take_snapshot(store, "codes", {}), 0, "b" * 64)


def test_a_token_shard_that_changed_is_named_before_a_code_of_it_is_read(learned: Learned, tmp_path: Path) -> None:
    tokens = shutil.copytree(learned.tokens, tmp_path / "tokens")
    store = open_store(str(tokens))
    snapshot = take_snapshot(store, "codes", {})
    assert snapshot.tokenizer is not None
    key = read_receipts(store)[1].files["parquet"].key
    data = bytearray((tokens / key).read_bytes())
    data[len(data) // 3] ^= 1
    (tokens / key).write_bytes(bytes(data))
    reader = codes_reader(store, snapshot, 0, snapshot.tokenizer)
    with pytest.raises(DamagedArtifact, match=key):
        list(reader.rows(0, reader.rows_per_epoch))
    (tokens / key).unlink()
    with pytest.raises(DamagedArtifact, match="no file"):
        list(codes_reader(store, snapshot, 0, snapshot.tokenizer).rows(0, reader.rows_per_epoch))


def test_a_tar_that_was_cut_is_named(make_pairs: MakePairs) -> None:
    pairs = make_pairs(shards=1)
    reader = _pictures(pairs)
    tar = pairs / read_receipts(open_store(str(pairs)))[0].files["tar"].key
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(DamagedArtifact, match=tar.name):
        list(reader.rows(0, 1))


def test_what_goes_wrong_in_the_prefetching_thread_is_raised_where_the_batch_is_taken() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise DamagedArtifact("tokens/data/00001.parquet", "a", "b")
        return step

    with Prefetch(make, 0, 10) as batches:
        assert [batches.take(), batches.take()] == [0, 1]
        with pytest.raises(DamagedArtifact):
            batches.take()


def test_a_loop_that_is_left_early_leaves_no_thread() -> None:
    with Prefetch(lambda step: step, 0, 1_000_000) as batches:
        batches.take()
    assert not batches._thread.is_alive()
