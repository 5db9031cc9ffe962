"""Commit rule of shards: what is published is whole, once, and found through its receipt."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.cluster import REPO
from infra.store import LocalStore, Store, open_store
from ops.errors import DamagedArtifact, StorageError, UnknownFormat
from ops.shards import (
    GRACE_S,
    Receipt,
    download,
    publish,
    read_receipts,
    read_table,
    read_verified,
    scratch_directory,
    tar_members,
    write_table,
    write_tar,
)

MEMBERS = [("000000000.jpg", b"j" * 700), ("000000000.json", b"{}"), ("000000000.txt", "Möwe".encode())]


@pytest.fixture
def store(place: str) -> Store:
    """On local disk, on moto and on SeaweedFS."""
    return open_store(place)


def receipt_of(generation: int = 0, kept: int = 1) -> Receipt:
    return Receipt("pairs", 7, generation, {"work_order": "ab" * 32}, rows=2, kept=kept, rejected={"aspect": 2 - kept})


def scratch_files(tmp_path: Path, members: list[tuple[str, bytes]] = MEMBERS) -> dict[str, Path]:
    write_tar(tmp_path / "t.tar", members)
    write_table(tmp_path / "t.parquet", pa.table({"uid": ["a", "b"]}))
    return {"tar": tmp_path / "t.tar", "parquet": tmp_path / "t.parquet"}


def test_a_tar_opens_in_tarfile_and_its_offsets_give_random_access(tmp_path: Path) -> None:
    offsets = write_tar(tmp_path / "t.tar", MEMBERS)
    data = (tmp_path / "t.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        read = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
    assert read == MEMBERS
    assert [data[offsets[name] : offsets[name] + len(body)] for name, body in MEMBERS] == [b for _, b in MEMBERS]
    assert [(name, data[at : at + size]) for name, at, size in tar_members(tmp_path / "t.tar")] == MEMBERS


def test_a_table_gives_the_same_bytes_however_its_chunks_lie(tmp_path: Path) -> None:
    whole = pa.table({"n": list(range(100))})
    pieces = pa.concat_tables([whole.slice(0, 33), whole.slice(33)])
    assert write_table(tmp_path / "a", whole, 40) == write_table(tmp_path / "b", pieces, 40) == (40, 40, 20)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    metadata = pq.ParquetFile(tmp_path / "a").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [40, 40, 20]


def test_a_published_shard_is_found_through_its_receipt_alone(store: Store, tmp_path: Path) -> None:
    assert read_receipts(store) == {}
    published = publish(store, receipt_of(), scratch_files(tmp_path))
    assert published is not None
    assert read_receipts(store) == {7: published}
    assert Receipt.from_json(store.read("receipts/00007.g0.json")).digest == published.digest
    assert read_table(store, published)["uid"].to_pylist() == ["a", "b"]
    assert read_verified(store, published.files["tar"]) == (tmp_path / "t.tar").read_bytes()
    download(store, published.files["tar"], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "t.tar").read_bytes()


def test_readers_take_the_highest_generation(store: Store, tmp_path: Path) -> None:
    for generation in (0, 10, 9):
        assert publish(store, receipt_of(generation), scratch_files(tmp_path))
    assert read_receipts(store)[7].generation == 10


def test_equal_bytes_are_ours_and_other_bytes_lose_the_race(store: Store, tmp_path: Path) -> None:
    first = publish(store, receipt_of(), scratch_files(tmp_path))
    assert publish(store, receipt_of(), scratch_files(tmp_path)) == first
    assert publish(store, receipt_of(kept=0), scratch_files(tmp_path, [])) is None
    assert read_receipts(store)[7] == first
    assert first is not None
    assert read_verified(store, first.files["tar"])


def test_an_old_file_of_a_dead_attempt_is_made_young_by_the_commit(tmp_path: Path) -> None:
    """Else a sweep that runs between the upload and the receipt could take it away."""
    store = open_store(str(tmp_path / "pairs"))
    first = publish(store, receipt_of(), scratch_files(tmp_path))
    assert first is not None
    store.delete(first.key)
    for ref in first.files.values():
        os.utime(tmp_path / "pairs" / ref.key, (1, 1))
    publish(store, receipt_of(), scratch_files(tmp_path))
    for ref in first.files.values():
        entry = store.stat(ref.key)
        assert entry is not None
        assert entry.modified_s > store.clock_s() - 60


def test_of_sixteen_publishers_of_other_bytes_one_receipt_stands(store: Store, tmp_path: Path) -> None:
    """Each has other pictures, so that each believes in other data files."""
    start = threading.Barrier(16)

    def attempt(writer: int) -> Receipt | None:
        directory = tmp_path / str(writer)
        directory.mkdir()
        files = scratch_files(directory, [("000000000.jpg", b"%d" % writer * 1000), *MEMBERS[1:]])
        start.wait()
        return publish(store, receipt_of(), files)

    with ThreadPoolExecutor(16) as pool:
        published = list(pool.map(attempt, range(16)))
    [winner] = [number for number, receipt in enumerate(published) if receipt is not None]
    stands = read_receipts(store)[7]
    assert stands == published[winner]
    assert read_verified(store, stands.files["tar"]) == (tmp_path / f"{winner}/t.tar").read_bytes()


def test_a_race_that_is_lost_after_the_upload_leaves_the_rivals_receipt(tmp_path: Path) -> None:
    rival = receipt_of(kept=0)

    class Overtaken(LocalStore):
        """Another attempt commits while our first data file is uploaded."""

        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            if key.startswith("data/"):
                super().put(rival.key, rival.to_json())
            return super().put(key, data, if_absent=if_absent)

    store = Overtaken(tmp_path / "pairs")
    assert publish(store, receipt_of(kept=1), scratch_files(tmp_path)) is None
    assert store.read(rival.key) == rival.to_json()


@pytest.mark.parametrize("extension", ["tar", "parquet"])
def test_a_file_that_a_slow_sweep_takes_before_the_receipt_is_put_again(tmp_path: Path, extension: str) -> None:
    """The sweep saw it old, the commit made it young and saw it there, then the sweep deletes it."""

    class Swept(LocalStore):
        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            if key.startswith("receipts/"):
                (victim,) = (entry.key for entry in self.list("data/") if entry.key.endswith(extension))
                self.delete(victim)
            return super().put(key, data, if_absent=if_absent)

    store = Swept(tmp_path / "pairs")
    published = publish(store, receipt_of(), scratch_files(tmp_path))
    assert published is not None
    for ref in published.files.values():
        assert read_verified(store, ref)


def test_an_attempt_older_than_half_the_grace_does_not_commit(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Run the same command again"):
        publish(store, receipt_of(), scratch_files(tmp_path), started_s=store.clock_s() - GRACE_S / 2 - 1)
    assert read_receipts(store) == {}


def test_a_receipt_of_a_later_version_or_of_garbage_is_refused_in_words(store: Store) -> None:
    store.put("receipts/00003.g0.json", b'{"format": 99}')
    with pytest.raises(UnknownFormat, match=r"receipts/00003\.g0\.json has format 99"):
        read_receipts(store)
    store.put("receipts/00003.g0.json", b"half a rec", if_absent=False)
    with pytest.raises(DamagedArtifact, match="00003"):
        read_receipts(store)


def test_damaged_and_missing_data_is_named(store: Store, tmp_path: Path) -> None:
    receipt = publish(store, receipt_of(), scratch_files(tmp_path))
    assert receipt is not None
    store.put(receipt.files["tar"].key, b"torn", if_absent=False)
    store.delete(receipt.files["parquet"].key)
    with pytest.raises(DamagedArtifact, match="sha256"):
        read_verified(store, receipt.files["tar"])
    with pytest.raises(DamagedArtifact, match="sha256"):
        download(store, receipt.files["tar"], tmp_path / "copy")
    with pytest.raises(DamagedArtifact, match="no file"):
        download(store, receipt.files["parquet"], tmp_path / "copy")
    with pytest.raises(DamagedArtifact, match="no file"):
        read_table(store, receipt)


def test_scratch_of_a_killed_attempt_is_removed_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, lock = tmp_path / "armchair-shard-dead", tmp_path / "armchair-shard-dead.lock"
    dead.mkdir()
    (dead / "shard.tar").touch()
    lock.touch()
    os.utime(lock, (1, 1))
    with scratch_directory() as living:
        assert not dead.exists()
        assert not lock.exists()
        os.utime(living.with_suffix(".lock"), (1, 1))
        with scratch_directory():
            assert living.exists()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from ops.shards import scratch_directory

deadly, left = sys.argv[1], int(sys.argv[2])

def kill(event, arguments):
    global left
    if event == deadly and "armchair-shard-" in f"{arguments[0]} {inside}":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

inside = ""
sys.addaudithook(kill)
with scratch_directory() as scratch:
    for name in "abc":
        (scratch / name).touch()
    inside = scratch
"""


KILLS = [("open", 0), ("os.mkdir", 0), ("open", 1), *(("os.remove", n) for n in range(4)), ("os.rmdir", 0)]


@pytest.mark.parametrize(("event", "number"), KILLS)
def test_scratch_is_found_whenever_its_attempt_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, number: int
) -> None:
    """Also between its names, and in the middle of its own removal."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, event, str(number)], cwd=REPO, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_directory():
        pass
    assert list(tmp_path.iterdir()) == []
