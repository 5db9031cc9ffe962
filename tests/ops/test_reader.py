from __future__ import annotations

import doctest
import json
import shutil
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ops.reader
import ops.seeds
from infra.store import Store, open_store
from ops.drops import add_drops, drop_rows, url_hash
from ops.errors import DamagedArtifact, StorageError
from ops.reader import Order, Prefetch, Share, codes_reader, pictures_reader
from ops.recipes import sha256
from ops.seeds import derived_share
from ops.shards import FileRef, read_receipts
from ops.snapshot import SNAPSHOT, Group, Groups, PinnedShard, Snapshot, read_snapshot, take_snapshot
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


def test_the_order_is_the_one_that_runs_of_earlier_versions_began_with() -> None:
    order = Order([3, 0, 5, 2, 7, 1, 4], seed=5, window_groups=2)
    in_turn = [(place.group, place.row) for place in map(order.at, range(20, 44))]
    assert in_turn[:13] == [
        *((6, 2), (6, 3), (0, 1), (0, 2), (3, 0), (0, 0), (3, 1)),
        *((4, 1), (4, 0), (4, 2), (4, 3), (5, 0), (4, 4)),
    ]
    assert in_turn[20:] == [(6, 2), (6, 1), (6, 3), (6, 0)]  # the next epoch
    large = Order([251, 250, 0, 256, 13] * 40, seed=1, window_groups=16)
    places = [(place.epoch, place.group, place.row) for place in map(large.at, range(20_000, 60_000))]
    assert sha256(json.dumps(places).encode()) == "c1489708119e6f27c82f3169cf119e49f5055f5b481f245fae0b44b02d5fb418"


def test_the_places_of_a_window_are_those_of_its_positions() -> None:
    order = Order([3, 0, 5, 2, 0, 0, 7, 1, 4, 0, 0], seed=2, window_groups=2)  # some windows may be empty
    position, windows = 0, []
    while position < 3 * order.rows:
        window = order.window(position)
        assert window.start == position < window.stop
        windows.append(window)
        groups, rows = order.places(window, window.start, window.stop)
        expected = [order.at(at) for at in range(window.start, window.stop)]
        assert [*zip(groups.tolist(), rows.tolist(), strict=True)] == [(place.group, place.row) for place in expected]
        assert {place.epoch for place in expected} == {window.epoch}
        assert set(groups.tolist()) <= set(window.groups.tolist())
        position = window.stop
    assert position == 3 * order.rows  # no window crosses from one epoch into the next


def test_a_windowed_shuffle_is_near_a_full_one() -> None:
    """10,000 rows a shard, as they come: 40 groups each. What differs is how many shards the rows of a batch are of."""
    shards, groups, rows, window, batch = 400, 40, 64, 16, 64
    order = Order([rows] * (shards * groups), seed=0, window_groups=window)
    at = [order.window(start) for start in range(0, order.rows, window * rows)]
    places = [order.places(each, each.start, each.stop) for each in at]
    shard = np.concatenate([of for of, _ in places]) // groups
    row = np.concatenate([of for of, _ in places]) * rows + np.concatenate([of for _, of in places])
    full = np.random.default_rng(0).permutation(len(shard))

    def of_batches(values: np.ndarray) -> float:
        """Variance of the means of batches, as a multiple of that of independent rows (1)."""
        return float(values.reshape(-1, batch).mean(1).var() * batch / values.var())

    rng = np.random.default_rng(1)
    of_row, of_shard = rng.normal(size=len(shard)), rng.normal(size=shards)[shard]
    neighbours = {name: float(np.mean(np.diff(x) == 0)) for name, x in (("window", shard), ("full", shard[full]))}
    print(f"neighbours of one shard: {neighbours['window']:.4f} in windows, {neighbours['full']:.4f} in a full shuffle")
    print(f"variance of batches: {of_batches(of_row[row]):.3f} of a value by row, {of_batches(of_shard):.3f} by shard")
    print(f"in a full shuffle: {of_batches(of_row[full]):.3f} and {of_batches(of_shard[full]):.3f}")
    # Rows are dealt to shards by hash, so a value is one by row, and batches are as in a full shuffle.
    assert of_batches(of_row[row]) == pytest.approx(1, abs=0.06)
    assert of_batches(of_shard[full]) == pytest.approx(1, abs=0.06)
    # If a shard had something of its own, a batch would show it as 16 groups would: 1 + (64 - 1) / 16 and no more.
    assert of_batches(of_shard) < 1.2 * (1 + (batch - 1) / window)
    assert neighbours["window"] < 1.1 * (1 / window + 1 / shards)
    # Where a shard's rows come in an epoch says nothing of its number: neighbours in the file come far from each other.
    position = np.empty(len(row))
    position[row] = np.arange(len(row))
    of_group = position.reshape(-1, rows).mean(1)
    far = float(np.mean(np.abs(np.diff(of_group)))) / len(row)
    print(f"groups that are neighbours in a file are {far:.3f} of an epoch apart (a full shuffle of them: 0.333)")
    assert far == pytest.approx(1 / 3, abs=0.02)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def walk(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = Order([20, 20, 20], seed, 2)
        return [(p.group, p.row) for p in map(order.at, range(60 * epoch, 60 * epoch + 60))]

    walks = [walk(0, 0), walk(0, 1), walk(1, 0)]
    assert all(a != b for i, a in enumerate(walks) for b in walks[i + 1 :])


def test_a_window_of_one_group_still_shuffles_within_it() -> None:
    rows = [Order([50], 0, 1).at(position).row for position in range(50)]
    assert rows != sorted(rows)


def _pictures(pairs: Path, seed: int = 0, store: Store | None = None) -> ops.reader.Reader[bytes]:
    store = store or open_store(str(pairs))
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


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_number_of_ranks_read_together_what_one_reads(make_pairs: MakePairs, world: int) -> None:
    pairs = make_pairs()
    one = [(row.position, row.uid, row.payload) for row in _pictures(pairs).rows(0, 144)]
    ranks = [_pictures(pairs) for _ in range(world)]
    together = []
    for start in range(0, 144, 24):  # batches of 24, each rank its part
        share = 24 // world
        for rank, reader in enumerate(ranks):
            rows = reader.rows(start + rank * share, start + (rank + 1) * share)
            together += [(row.position, row.uid, row.payload) for row in rows]
    assert together == one


def _counted(pairs: Path, window_groups: int) -> tuple[ops.reader.Reader[bytes], list[tuple[int, int]]]:
    """A reader, and the groups that it has read: (shard, first row) of each."""
    store, read = open_store(str(pairs)), []

    def load(files: Any, shard: PinnedShard, group: Group, *of: Any) -> Any:
        read.append((shard.shard, group.first))
        return ops.reader._load_pictures(files, shard, group, *of)

    return ops.reader.Reader(store, take_snapshot(store, "pictures", {}), 0, window_groups, load), read


def test_a_rank_that_takes_its_part_of_each_batch_reads_a_group_once_an_epoch(make_pairs: MakePairs) -> None:
    reader, read = _counted(make_pairs(shards=6, rows=20), window_groups=2)
    for start in range(0, reader.rows_per_epoch, 8):
        list(reader.rows(start + 2, min(start + 4, reader.rows_per_epoch)))
    _idle(reader)
    assert sorted(read[:6]) == [(shard, 0) for shard in range(6)]
    assert len(read) <= 6 + 2  # and of the next epoch's first window what was not at hand


def test_while_a_window_is_given_the_next_one_is_read_and_no_more(make_pairs: MakePairs) -> None:
    reader, read = _counted(make_pairs(shards=6, rows=20), window_groups=2)
    first = reader._order.window(0)
    list(reader.rows(0, 1))
    _idle(reader)
    following = reader._order.window(first.stop)
    assert sorted(read) == sorted((group, 0) for window in (first, following) for group in window.groups.tolist())
    list(reader.rows(1, first.stop))
    _idle(reader)
    assert len(read) == 4
    list(reader.rows(first.stop, first.stop + 1))
    _idle(reader)
    assert len(read) == 6


class _Ranges:
    """A store that notes what is read of tars."""

    def __init__(self, pairs: Path) -> None:
        self._store, self.read_bytes, self.requests = open_store(str(pairs)), 0, 0

    def read_range(self, key: str, start: int, length: int) -> bytes:
        self.read_bytes, self.requests = self.read_bytes + length, self.requests + 1
        return self._store.read_range(key, start, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_rank_of_many_reads_its_own_pictures_and_not_those_of_others(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(shards=4, rows=60)
    monkeypatch.setattr(ops.reader, "GAP_BYTES", 0)
    snapshot = take_snapshot(open_store(str(pairs)), "pictures", {})
    one = [*_pictures(pairs).rows(0, 320)]
    everything = sum(len(row.payload) for row in one)
    together, most = [], 0
    stores = [_Ranges(pairs) for _ in range(8)]
    for rank, store in enumerate(stores):
        share = Share.of_rank(32, rank, 8)
        reader = pictures_reader(store, snapshot, 0, share=share)  # type: ignore[arg-type]
        for start in range(0, 320, 32):
            together += reader.rows(start + share.begin, start + share.end)
        _idle(reader)
        most = max(most, store.read_bytes)
    assert sorted(together) == sorted(one)
    ahead = 2 * reader.rows_per_epoch / 320  # up to the end of the window after the last one, here an epoch each
    assert most < 1.6 * ahead * everything / 8
    # What is not of the share can be had as well: pictures that the model is initialised on.
    assert [*reader.rows(0, 64)] == one[:64]


def test_pictures_that_lie_near_each_other_are_one_request(make_pairs: MakePairs) -> None:
    pairs = make_pairs(shards=1, rows=60)
    store = _Ranges(pairs)
    reader = pictures_reader(store, take_snapshot(open_store(str(pairs)), "pictures", {}), 0)  # type: ignore[arg-type]
    list(reader.rows(0, reader.rows_per_epoch))
    assert store.requests == 1
    list(reader.held_out())
    assert store.requests == 2


def _idle(reader: ops.reader.Reader[Any]) -> None:
    wait(list(reader._loaded.values()))


def test_a_reader_that_is_forgotten_leaves_no_thread(make_pairs: MakePairs) -> None:
    pairs, before = make_pairs(), set(threading.enumerate())
    reader = _pictures(pairs)
    list(reader.rows(0, 8))
    threads = set(threading.enumerate()) - before
    assert threads
    del reader
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_memory_is_two_windows_of_groups_however_many_shards_there_are(make_pairs: MakePairs) -> None:
    def most_bytes(shards: int) -> int:
        store = open_store(str(make_pairs(shards=shards, rows=20, name=f"of-{shards}")))
        snapshot = take_snapshot(store, "pictures", {})
        reader = pictures_reader(store, snapshot, seed=0, window_groups=2)
        tracemalloc.start()
        arrow, most = pa.total_allocated_bytes(), 0
        for start in range(0, reader.rows_per_epoch, 8):
            list(reader.rows(start, start + 8))
            _idle(reader)
            assert len(reader._loaded) <= 4
            most = max(most, tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow)
        tracemalloc.stop()
        return most

    most_bytes(3)  # what is imported and made once
    small, large = most_bytes(4), most_bytes(24)
    assert large < 1.3 * small


def test_a_snapshot_of_a_quarter_of_a_billion_rows_is_small_in_memory() -> None:
    """25,000 shards of 10,000 rows: a million groups, and whatever a reader keeps of them."""
    groups = Groups.of((first, 256, 250, 6, 0) for first in range(0, 40 * 256, 256))
    files = {"tar": FileRef("data/0.tar", 1 << 28, "0" * 64), "parquet": FileRef("data/0.parquet", 1 << 21, "0" * 64)}
    snapshot = Snapshot("pictures", {}, 1, None, (PinnedShard(0, 0, "0" * 64, files, groups),) * 25_000, ())
    assert snapshot.rows() == 250_000_000
    store = open_store("nowhere")
    tracemalloc.start()
    reader = pictures_reader(store, snapshot, 0)
    places = [reader._order.at(position) for position in range(0, 600_000_000, 150_000_000)]  # three epochs
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [place.epoch for place in places] == [0, 0, 1, 1]
    print(f"a reader of a million groups holds {held / 1e6:.0f} MB, {most / 1e6:.0f} MB at most")
    assert held < 100e6
    assert most < 150e6


def test_drops_and_shards_that_come_between_a_kill_and_a_resume_move_no_position(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    pairs = make_pairs()
    store, into = open_store(str(pairs)), open_store(str(tmp_path / "into"))
    into.put(SNAPSHOT, take_snapshot(store, "pictures", {}).to_json())
    undisturbed = pictures_reader(store, read_snapshot(into), 0)
    stop = 4 * undisturbed.rows_per_epoch
    expected = {row.position: (row.uid, row.payload) for row in undisturbed.rows(0, stop)}
    cursor = undisturbed.rows_per_epoch + 16  # in the middle of an epoch and of a window
    before = {
        row.position: (row.uid, row.payload) for row in pictures_reader(store, read_snapshot(into), 0).rows(0, cursor)
    }
    gone = set(sorted({uid for uid, _ in before.values()})[:9])
    add_drops(store, drop_rows([(bytes.fromhex(uid), None) for uid in gone], "takedown"))
    write_pair_shard(pairs, 2, list(range(80, 120)))
    assert take_snapshot(store, "pictures", {}).rows() > read_snapshot(into).rows()
    resumed = {
        row.position: (row.uid, row.payload)
        for row in pictures_reader(store, read_snapshot(into), 0).rows(cursor, stop)
    }
    assert resumed == {at: row for at, row in expected.items() if at >= cursor and row[0] not in gone}
    assert len(resumed) == (stop - cursor) - sum(row[0] in gone for at, row in expected.items() if at >= cursor)
    assert before == {at: row for at, row in expected.items() if at < cursor}


def test_the_rows_of_a_bucket_are_those_of_a_disk(make_pairs: MakePairs, bucket: str) -> None:
    pairs = make_pairs()
    there = open_store(bucket)
    for path in pairs.rglob("*"):
        if path.is_file():
            there.put(path.relative_to(pairs).as_posix(), path)
    here, reader = _pictures(pairs), _pictures(Path("unused"), store=there)
    stop = 2 * here.rows_per_epoch
    assert [*reader.rows(0, stop)] == [*here.rows(0, stop)]
    assert [*reader.held_out()] == [*here.held_out()]
    tar = read_receipts(there)[1].files["tar"].key
    there.put(tar, there.read(tar)[:-512], if_absent=False)
    with pytest.raises(DamagedArtifact, match=tar):
        [*_pictures(Path("unused"), store=there).rows(0, stop)]


def test_a_file_that_is_restored_is_read_by_the_same_reader(make_pairs: MakePairs) -> None:
    pairs = make_pairs(shards=1)
    reader = _pictures(pairs)
    tar = pairs / read_receipts(open_store(str(pairs)))[0].files["tar"].key
    away = tar.rename(tar.with_name("away"))
    with pytest.raises(DamagedArtifact, match="no file"):
        list(reader.rows(0, 1))
    away.rename(tar)
    assert [row.position for row in reader.rows(0, 4)] == [0, 1, 2, 3]


def test_two_that_read_in_turns_in_different_windows_get_what_is_theirs(make_pairs: MakePairs) -> None:
    reader, _ = _counted(make_pairs(shards=6, rows=20), window_groups=1)
    far = 4 * reader.rows_per_epoch // 6
    expected = [
        (row.uid, other.uid) for row, other in zip([*reader.rows(0, 8)], [*reader.rows(far, far + 8)], strict=True)
    ]
    in_turns = zip(reader.rows(0, 8), reader.rows(far, far + 8), strict=True)
    assert [(row.uid, other.uid) for row, other in in_turns] == expected


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


def test_the_seconds_that_a_step_waited_are_those_that_its_batch_was_late() -> None:
    with Prefetch(lambda step: time.sleep(0.2), 0, 4) as late:
        for _ in range(4):
            late.take()
    assert 0.6 < late.waited_s < 1.5
    with Prefetch(lambda step: step, 0, 4) as early:
        for _ in range(4):
            time.sleep(0.1)
            early.take()
    assert early.waited_s < 0.1
