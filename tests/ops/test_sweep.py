"""`sweep` removes what nothing names and what is old, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from infra.store import TEMPORARY, LocalStore, open_store
from ops.attempts import Attempt, count_deferrals, list_attempts
from ops.demo_web import DemoWeb, serve
from ops.errors import DamagedArtifact
from ops.ingest import ingest_shard
from ops.receipt_index import INDEX
from ops.shards import GRACE_S, read_receipts
from ops.sweep import sweep
from tests.buckets import BUCKET
from tests.pairs import assert_conserved, generated, pending, plan, reruns

OLD = ("data/00000-0123456789abcdef.tar", "plan/00000-0123456789abcdef.parquet", f"data/{TEMPORARY}0f-00000.tar")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[DemoWeb]:
    with serve(tmp_path) as web:
        yield web


@pytest.fixture
def pairs(web: DemoWeb) -> list[tuple[str, str]]:
    return [*generated(web.url, range(7)), (f"{web.url}/hostile/heals_later/1", "a shy picture")]


@pytest.fixture
def store(tmp_path: Path, pairs: list[tuple[str, str]]) -> LocalStore:
    store = LocalStore(tmp_path / "pairs")
    plan(store, tmp_path / "list.tsv", pairs, pairs_per_shard=4)
    for task in pending(store):
        ingest_shard(task)
    return store


def make_old(store: LocalStore) -> None:
    """All that is there was written before the grace time."""
    for path in store.root.rglob("*"):
        if path.is_file():
            os.utime(path, (store.clock_s() - GRACE_S - 60,) * 2)


def test_old_files_that_nothing_names_go_and_all_others_stay(store: LocalStore, pairs: list[tuple[str, str]]) -> None:
    for key in OLD:
        (store.root / key).write_bytes(b"left by a killed attempt")
    make_old(store)
    (store.root / "data/00001-0123456789abcdef.tar").write_bytes(b"an attempt of now")
    before = {entry.key for entry in store.list()}
    assert set(sweep(store)) == set(OLD)
    assert {entry.key for entry in store.list()} == before - set(OLD)
    assert_conserved(store, pairs)
    assert sweep(store) == []


def test_superseded_generations_stay_unless_asked_for(store: LocalStore, pairs: list[tuple[str, str]]) -> None:
    first = read_receipts(store)
    while tasks := reruns(store):
        for task in tasks:
            ingest_shard(task)
    (shard,) = (shard for shard, receipt in read_receipts(store).items() if receipt.generation)
    make_old(store)
    assert sweep(store) == []
    removed = sweep(store, superseded=True)
    assert first[shard].key in removed
    assert {ref.key for ref in first[shard].files.values()} <= set(removed)
    assert_conserved(store, pairs)


def test_a_generation_superseded_within_the_grace_stays_for_those_who_read_it(store: LocalStore) -> None:
    make_old(store)
    for task in reruns(store):
        ingest_shard(task)
    assert sweep(store, superseded=True) == []


def test_nothing_is_removed_where_a_receipt_can_not_be_read(store: LocalStore) -> None:
    """It might name anything."""
    (store.root / OLD[0]).write_bytes(b"left")
    store.put("receipts/00001.g0.json", b"half a rec", if_absent=False)
    make_old(store)
    with pytest.raises(DamagedArtifact):
        sweep(store)
    assert (store.root / OLD[0]).exists()


def test_a_shard_is_made_again_after_its_receipt_was_deleted_and_its_files_swept(
    store: LocalStore, pairs: list[tuple[str, str]]
) -> None:
    store.delete("receipts/00000.g0.json")
    make_old(store)
    assert all(key.startswith("data/00000-") for key in sweep(store))
    for task in pending(store):
        ingest_shard(task)
    assert_conserved(store, pairs)


def test_attempts_of_committed_shards_go_but_the_last_and_those_that_count_deferrals_stay(store: LocalStore) -> None:
    tried = [(0, 0, "deferred"), (1, 0, "failed"), (1, 1, "already"), (7, 0, "deferred"), (7, 0, "deferred")]
    for shard, generation, state in tried:
        with Attempt(store, "pairs", shard, generation) as attempt:
            attempt.end(state)  # type: ignore[arg-type]
    make_old(store)
    assert store.stat("receipts/00007.g0.json") is None
    with Attempt(store, "pairs", 1, 1, "a rerun of now") as attempt:
        attempt.end("already")
    assert len(sweep(store)) == 3, "one of shard 0, and one of each generation of shard 1"
    assert [(name.shard, name.generation) for name in list_attempts(store)] == [(0, 0), (1, 0), (1, 1), (7, 0), (7, 0)]
    assert count_deferrals(store, 7, 0) == 2


def test_the_index_of_receipts_goes_when_it_is_old(store: LocalStore) -> None:
    store.put(INDEX, b"derived")
    assert sweep(store) == [], "young"
    make_old(store)
    assert sweep(store) == [INDEX]


def test_an_upload_that_was_never_ended_is_swept_from_a_bucket(bucket: str) -> None:
    """It is paid for, and no listing of objects shows it."""
    store = open_store(bucket)
    name = f"{bucket.removeprefix(f's3://{BUCKET}/')}/data/00000-0123456789abcdef.tar"
    client = boto3.client("s3")
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=name)["UploadId"]
    client.upload_part(Bucket=BUCKET, Key=name, UploadId=upload, PartNumber=1, Body=b"half")
    client.close()
    assert sweep(store) == [], "young"
    [swept] = sweep(store, grace_s=-60)
    assert swept.startswith("data/.tmp-")
    assert list(store.list(temporary=True)) == []
