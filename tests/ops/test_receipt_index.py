"""The index of receipts saves reads and is never believed over the receipts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import ops.receipt_index
from infra.store import Entry, LocalStore, open_store
from ops.receipt_index import INDEX, ReceiptIndex
from ops.shards import FileRef, Receipt


@pytest.fixture(autouse=True)
def worth_it_at_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.receipt_index, "WORTH", 3)


class Counting(LocalStore):
    """A directory that tells which receipts were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def read(self, key: str) -> bytes:
        if key.startswith("receipts/"):
            self.asked.append(key)
        return super().read(key)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    store = Counting(tmp_path)
    for shard in range(4):
        commit(store, shard)
    return store


def commit(store: LocalStore, shard: int, generation: int = 0, kept: int = 3) -> Receipt:
    files = {
        "tar": FileRef(f"data/{shard:05d}-ab.tar", 100, "ab"),
        "parquet": FileRef(f"data/{shard:05d}-cd", 10, "cd"),
    }
    rejected = {"aspect": 5 - kept} if kept < 5 else {}
    receipt = Receipt("pairs", shard, generation, {"work_order": "ef"}, 5, kept, rejected, files)
    assert store.put(receipt.key, receipt.to_json())
    return receipt


def kept(store: LocalStore) -> dict[int, int]:
    return {shard: summary.kept for shard, summary in ReceiptIndex(store).look().items()}


def test_a_second_command_reads_only_what_is_new(store: Counting) -> None:
    first = ReceiptIndex(store).look()
    assert sorted(store.asked) == [f"receipts/{shard:05d}.g0.json" for shard in range(4)]
    store.asked.clear()
    assert ReceiptIndex(store).look() == first
    assert store.asked == []
    receipt = commit(store, 2, generation=1, kept=5)
    now = ReceiptIndex(store).look()
    assert store.asked == ["receipts/00002.g1.json"]
    assert (now[2].generation, now[2].kept, now[2].bytes, now[2].digest) == (1, 5, 110, receipt.digest)


def test_a_receipt_that_was_deleted_does_not_count_and_one_made_again_is_read_again(store: Counting) -> None:
    kept(store)
    store.delete("receipts/00001.g0.json")
    assert 1 not in kept(store)
    commit(store, 1, kept=4)
    assert kept(store)[1] == 4


@pytest.mark.parametrize("damage", ["torn", "flipped", "of a later version", "of another shape", "a directory"])
def test_an_index_that_can_not_be_trusted_is_as_good_as_none(store: Counting, damage: str) -> None:
    truth = kept(store)
    data = store.read(INDEX)
    if damage == "a directory":
        store.delete(INDEX)
        (store.root / INDEX).mkdir()
    elif damage == "torn":
        store.put(INDEX, data[: len(data) // 2], if_absent=False)
    elif damage == "flipped":
        store.put(INDEX, data.replace(b'"aspect":2', b'"aspect":7'), if_absent=False)
    elif damage == "of a later version":
        store.put(INDEX, json.dumps({"format": 99}).encode(), if_absent=False)
    else:
        store.put(INDEX, ops.receipt_index.seal({"format": 1, "receipts": [[1, 2]]}), if_absent=False)
    store.asked.clear()
    assert kept(store) == truth
    assert len(store.asked) == 4
    store.asked.clear()
    if damage != "a directory":
        assert kept(store) == truth
        assert store.asked == [], "it was written anew"


def test_without_the_right_to_write_the_numbers_are_the_same(store: Counting) -> None:
    class ReadOnly(Counting):
        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            raise PermissionError(13, "Permission denied", key)

    assert kept(ReadOnly(store.root)) == dict.fromkeys(range(4), 3)
    assert store.stat(INDEX) is None


def test_an_index_that_came_with_a_copy_is_not_believed(store: Counting) -> None:
    """A copy has other times. Whoever copies a stage and changes it must not be shown the old numbers."""
    kept(store)
    for path in store.root.glob("receipts/*"):
        os.utime(path, (1, 1))
    store.asked.clear()
    assert kept(store) == dict.fromkeys(range(4), 3)
    assert len(store.asked) == 4


def test_few_receipts_leave_no_index_behind(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    commit(store, 0)
    assert kept(store) == {0: 3}
    assert store.stat(INDEX) is None


def test_the_index_works_in_a_bucket(bucket: str) -> None:
    store = open_store(bucket)
    for shard in range(3):
        commit(store, shard)  # type: ignore[arg-type]
    first = ReceiptIndex(store).look()
    assert store.stat(INDEX) is not None

    class Blind:
        """The bucket, where no receipt can be read."""

        location = store.location

        def list(self, prefix: str = "", *, temporary: bool = False) -> Iterator[Entry]:
            return store.list(prefix, temporary=temporary)

        def read(self, key: str) -> bytes:
            assert not key.startswith("receipts/")
            return store.read(key)

    assert ReceiptIndex(Blind()).look() == first  # type: ignore[arg-type]
