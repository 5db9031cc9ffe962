"""Examples and hosts of the funnel: bounded, spread over shards, the same each time, and no shard stops them."""

from __future__ import annotations

import io
from collections import Counter

import pyarrow as pa
import pytest
from PIL import Image

from infra.store import LocalStore
from ops import funnel
from ops.funnel import MEANINGS, dealt, read_funnel, what_helps
from ops.reasons import Reason
from ops.shards import Receipt, publish, read_receipts, sidecar_schema, write_table
from tests.small_runs import write_pair_shard


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    location = tmp_path_factory.mktemp("funnel") / "pairs"
    for shard in range(14):
        write_pair_shard(location, shard, list(range(shard * 20, shard * 20 + 20)))
    return LocalStore(location)


class Counting(LocalStore):
    """A store that counts what is read of it."""

    def __init__(self, root):
        super().__init__(root)
        self.ranges, self.tables = [], 0

    def read_range(self, key, start, length):
        self.ranges.append((key, length))
        return super().read_range(key, start, length)

    def arrow(self):
        self.tables += 1
        return super().arrow()


def test_examples_are_ten_of_different_shards_and_the_same_each_time(pairs):
    receipts = read_receipts(pairs)
    first, second = read_funnel(pairs, receipts), read_funnel(pairs, receipts)
    assert first == second
    assert {status: len(examples) for status, examples in first.examples.items()} == {"success": 10, "timeout": 10}
    shards = Counter(int(example.url.rsplit("/", 1)[1]) // 20 for example in first.examples["success"])
    assert len(shards) == 10
    assert {0, 13} <= shards.keys()
    assert first.problems == ()
    assert (first.shards, first.of) == (14, 14)


def test_kept_pairs_come_with_thumbnails_and_rejected_ones_with_what_is_known(pairs):
    sampled = read_funnel(pairs, read_receipts(pairs))
    for example in sampled.examples["success"]:
        with Image.open(io.BytesIO(example.jpeg)) as image:
            assert image.format == "JPEG"
            assert max(image.size) <= 96
    for example in sampled.examples["timeout"]:
        assert example.jpeg is None
        assert example.caption.startswith("a ")
        assert example.url.startswith("http://example.org/")


def test_the_reading_is_bounded_and_says_so(pairs, monkeypatch):
    monkeypatch.setattr(funnel, "SHARDS_AT_MOST", 4)
    store = Counting(pairs.root)
    sampled = read_funnel(store, read_receipts(pairs))
    assert store.tables == 4
    assert len(store.ranges) == 10
    assert all(length < 5000 for _, length in store.ranges)
    assert (sampled.shards, sampled.of) == (4, 14)
    assert {key.split("-")[0] for key, _ in store.ranges} == {f"data/{shard:05d}" for shard in (0, 4, 9, 13)}


def test_a_damaged_shard_becomes_a_line_and_the_others_are_shown(tmp_path):
    for shard in range(3):
        write_pair_shard(tmp_path / "pairs", shard, list(range(20)))
    store = LocalStore(tmp_path / "pairs")
    receipts = read_receipts(store)
    (store.root / receipts[0].files["parquet"].key).write_bytes(b"no table")
    (store.root / receipts[1].files["tar"].key).unlink()
    sampled = read_funnel(store, receipts)
    assert sampled.problems[0].startswith("Shard 00000 can't be read")
    assert all(line.startswith("A picture of shard 00001 can't be shown") for line in sampled.problems[1:])
    assert len(sampled.problems) > 1
    assert len(sampled.examples["success"]) > 0


def read_statuses(location, rows):
    """What is read of one shard that holds these addresses and statuses."""
    table = pa.Table.from_pylist(
        [{"url": url, "caption": "c", "status": status} for url, status in rows], schema=sidecar_schema()
    )
    groups = write_table(location / "scratch", table)
    rejected = Counter(status for _, status in rows)
    receipt = Receipt("pairs", 0, 0, {}, rows=len(rows), kept=0, rejected=dict(rejected), row_groups=groups)
    store = LocalStore(location / "pairs")
    assert publish(store, receipt, {"parquet": location / "scratch"})
    return read_funnel(store, read_receipts(store))


def test_hosts_are_counted_by_name_with_their_share_and_main_reason(tmp_path):
    rows = [(f"https://user@Busy.example:444/{i}?a=//x/", "http_429") for i in range(5)]
    rows += [("http://busy.example/9", "timeout"), ("http://[::1]:80/a", "connect"), ("no address", "url_invalid")]
    rows += [("http://picky.example/1", "too_small")]  # our own policy: no failure of the host
    sampled = read_statuses(tmp_path, rows)
    busy = sampled.hosts[0]
    assert (busy.name, busy.asked, busy.failed, busy.reason) == ("busy.example", 6, 6, "http_429")
    assert "fetch.connections_per_host" in busy.help
    assert {host.name for host in sampled.hosts} == {"busy.example", "[::1]", "no host"}
    assert sampled.failed == 8


def test_fifteen_hosts_are_named_and_the_failures_of_all_are_counted(tmp_path):
    sampled = read_statuses(tmp_path, [(f"http://{i:02d}.example/", "http_4xx") for i in range(20)])
    assert [host.name for host in sampled.hosts] == [f"{i:02d}.example" for i in range(15)]
    assert sampled.failed == 20


def test_every_reason_has_a_meaning_and_a_next_step():
    assert MEANINGS.keys() == set(Reason)
    assert all(what_helps(reason) for reason in Reason)


def test_dealing_takes_one_of_each_in_turn():
    assert dealt([[1, 2, 3], [], [4]], 3) == [1, 4, 2]
    assert dealt([[n] for n in range(100)], 3) == [0, 50, 99]
    assert dealt([], 3) == []
