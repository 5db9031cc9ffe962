"""`verify` finds every way in which a pair could be lost, doubled, or counted without being on disk."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store import LocalStore
from ops.demo_web import DemoWeb, serve
from ops.errors import UsageError
from ops.ingest import ingest_shard
from ops.plan import read_instalments
from ops.recipes import sha256
from ops.shards import FileRef, Receipt, publish, read_receipts, read_table, tar_members, write_table, write_tar
from ops.verify import verify
from tests.pairs import generated, pending, plan


@pytest.fixture
def web(tmp_path: Path) -> Iterator[DemoWeb]:
    with serve(tmp_path) as web:
        yield web


@pytest.fixture
def store(tmp_path: Path, web: DemoWeb) -> LocalStore:
    """Two committed shards of six pairs, one of them rejected."""
    store = LocalStore(tmp_path / "pairs")
    pairs = [*generated(web.url, range(11)), (f"{web.url}/hostile/missing/1", "a picture that is gone")]
    plan(store, tmp_path / "list.tsv", pairs, pairs_per_shard=6)
    for task in pending(store):
        ingest_shard(task)
    assert verify(store, deep=True).problems == ()
    return store


def told(store: LocalStore, *, deep: bool) -> str:
    report = verify(store, deep=deep)
    assert report.ok is (report.problems == ())
    return "\n".join(f"{problem.shard}: {problem.what}" for problem in report.problems)


def rewrite(store: LocalStore, shard: int, change: Callable[[bytes], bytes], extension: str = "parquet") -> None:
    """Replaces a data file, and lets the receipt name the new one: the digests are right, the content is not."""
    receipt = read_receipts(store)[shard]
    data = change(store.read(receipt.files[extension].key))
    ref = FileRef(f"data/{shard:05d}-{sha256(data)[:16]}.{extension}", len(data), sha256(data))
    store.put(ref.key, data, if_absent=False)
    changed = replace(receipt, files=receipt.files | {extension: ref})
    store.put(receipt.key, changed.to_json(), if_absent=False)


def table_change(change: Callable[[pa.Table], pa.Table]) -> Callable[[bytes], bytes]:
    def on_bytes(data: bytes) -> bytes:
        sink = io.BytesIO()
        pq.write_table(change(pq.read_table(io.BytesIO(data))), sink)
        return sink.getvalue()

    return on_bytes


def test_a_missing_or_torn_data_file_is_found_without_reading_it(store: LocalStore) -> None:
    receipts = read_receipts(store)
    store.delete(receipts[0].files["tar"].key)
    store.put(receipts[1].files["parquet"].key, b"torn", if_absent=False)
    assert told(store, deep=False).splitlines() == [
        f"0: {receipts[0].files['tar'].key} is missing",
        f"1: {receipts[1].files['parquet'].key} has 4 bytes, its receipt says {receipts[1].files['parquet'].bytes}",
    ]


def test_one_flipped_bit_is_found_by_the_deep_check_alone(store: LocalStore) -> None:
    ref = read_receipts(store)[1].files["tar"]
    data = bytearray(store.read(ref.key))
    data[len(data) // 2] ^= 1
    store.put(ref.key, bytes(data), if_absent=False)
    assert told(store, deep=False) == ""
    assert told(store, deep=True).startswith("1: ")
    assert "sha256" in told(store, deep=True)


def test_a_pair_that_is_missing_or_doubled_in_a_sidecar_is_found(store: LocalStore) -> None:
    rewrite(store, 0, table_change(lambda table: table.slice(0, 5)))
    rewrite(store, 1, table_change(lambda table: pa.concat_tables([table.slice(0, 5), table.slice(0, 1)])))
    found = told(store, deep=True)
    assert "0: uid differs from the work order, first in row 5" in found
    assert "1: uid differs from the work order, first in row 5" in found


def test_a_pair_that_is_counted_and_not_in_the_tar_is_found(store: LocalStore, tmp_path: Path) -> None:
    def without_last_pair(data: bytes) -> bytes:
        (tmp_path / "tar").write_bytes(data)
        members = [(name, data[at : at + size]) for name, at, size in tar_members(tmp_path / "tar")]
        write_tar(tmp_path / "tar", members[:-3])
        return (tmp_path / "tar").read_bytes()

    rewrite(store, 0, without_last_pair, "tar")
    rewrite(store, 1, lambda data: b"no tar" * 2000, "tar")
    found = told(store, deep=True)
    assert "0: the tar holds" in found
    assert "1: the tar can't be read" in found


def test_a_row_counted_under_another_status_is_found(store: LocalStore) -> None:
    def all_kept(table: pa.Table) -> pa.Table:
        at = table.column_names.index("status")
        return table.set_column(at, "status", pa.array(["success"] * len(table)))

    shard = next(shard for shard, receipt in read_receipts(store).items() if receipt.rejected)
    rewrite(store, shard, table_change(all_kept))
    assert f"{shard}: its rows say 6 kept" in told(store, deep=True)


def test_an_offset_that_leads_elsewhere_is_found(store: LocalStore) -> None:
    def shifted(table: pa.Table) -> pa.Table:
        offsets = [at and at + 1 for at in table["tar_offset"].to_pylist()]
        return table.set_column(table.column_names.index("tar_offset"), "tar_offset", pa.array(offsets, pa.int64()))

    kept = [row for row in read_table(store, read_receipts(store)[1]).to_pylist() if row["status"] == "success"]
    rewrite(store, 1, table_change(shifted))
    assert f"1: {kept[0]['key']}.jpg lies at" in told(store, deep=True)


def test_receipts_that_do_not_add_up_or_belong_to_nothing_are_found(store: LocalStore) -> None:
    receipts = read_receipts(store)
    wrong = replace(receipts[0], kept=receipts[0].kept + 1)
    store.put(wrong.key, wrong.to_json(), if_absent=False)
    stranger = replace(receipts[1], shard=9)
    store.put(stranger.key, stranger.to_json())
    store.put("receipts/00001.g0.json", receipts[0].to_json(), if_absent=False)
    found = told(store, deep=False)
    assert "0: 6 rows, but" in found
    assert "1: its receipt says shard 0 g0" in found
    assert "9: no instalment names this shard" in found


def test_a_shard_made_from_another_work_order_is_told_with_both(store: LocalStore) -> None:
    order = read_instalments(store)[0].work_orders[0]
    other = replace(read_receipts(store)[0], made_from={"work_order": "ab"})
    store.put(other.key, other.to_json(), if_absent=False)
    assert told(store, deep=False) == (f"0: made from 6 rows of work order ab, planned are 6 rows of {order.sha256}")


def test_a_directory_without_plan_and_shards_proves_nothing(store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is nothing to verify"):
        verify(LocalStore(tmp_path / "elsewhere"))
    for key in [entry.key for entry in store.list("receipts/")]:
        store.delete(key)
    assert verify(store).ok, "planned and not committed is no problem"


def test_a_work_order_that_is_gone_or_replaced_is_found(store: LocalStore) -> None:
    orders = read_instalments(store)[0].work_orders
    store.delete(orders[0].key)
    store.put(orders[1].key, store.read(orders[1].key) + b" ", if_absent=False)
    found = told(store, deep=True)
    assert f"0: {store.location}/{orders[0].key} is damaged" in found
    assert f"1: {store.location}/{orders[1].key} is damaged" in found


def test_a_shard_that_is_not_committed_is_no_problem(store: LocalStore) -> None:
    store.delete("receipts/00001.g0.json")
    report = verify(store, deep=True)
    assert (report.ok, report.pairs, report.shards) == (True, 6, 1)


def codes_shard(store: LocalStore, tmp_path: Path, uids: list[list[str]]) -> None:
    table = pa.table(
        {
            "uid": [uid for crop in uids for uid in crop],
            "k": pa.array([k for k, crop in enumerate(uids) for _ in crop], pa.int32()),
            "codes": pa.array([[1, 2]] * sum(map(len, uids)), pa.list_(pa.uint16(), 2)),
        }
    )
    row_groups = write_table(tmp_path / "codes", table, len(uids[0]))
    receipt = Receipt("tokens", 0, 0, {"pairs": "ab", "tokenizer": "cd"}, 2, 2, row_groups=row_groups)
    assert publish(store, receipt, {"parquet": tmp_path / "codes"})


def test_token_shards_hold_the_same_pictures_for_each_crop(tmp_path: Path) -> None:
    good, bad = LocalStore(tmp_path / "good"), LocalStore(tmp_path / "bad")
    codes_shard(good, tmp_path, [["a", "b"], ["a", "b"]])
    codes_shard(bad, tmp_path, [["a", "b"], ["a", "c"]])
    assert told(good, deep=True) == ""
    assert told(bad, deep=True) == "0: its crops are not of the same pictures"


def test_a_tar_with_another_pairs_files_is_found(store: LocalStore, tmp_path: Path) -> None:
    receipts = read_receipts(store)
    shard = next(shard for shard, receipt in receipts.items() if not receipt.rejected)
    keys = read_table(store, receipts[shard])["key"].to_pylist()
    write_tar(tmp_path / "tar", [(f"{key}.{end}", b"{}") for key in keys for end in ("jpg", "txt", "json")])
    rewrite(store, shard, lambda _: (tmp_path / "tar").read_bytes(), "tar")
    assert "in order" in told(store, deep=True)
