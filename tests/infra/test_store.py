"""Every store: put whole or not at all, one winner, complete listings, and nothing half-written after a kill."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.store import TEMPORARY, LocalStore, ObjectPath, StoreError, absolute, join, open_store, parent

REPO = Path(__file__).parents[2]


class TestEveryStore:
    """The same promises on local disk, on moto, and on a real S3 server."""

    def test_what_was_put_is_read_listed_and_measured(self, place: str, tmp_path: Path) -> None:
        store = open_store(place)
        assert store.put("a/b/one", b"hello world")
        source = tmp_path / "source"
        source.write_bytes(b"x" * 3_000_000)
        assert store.put("two", source)
        assert store.read("a/b/one") == b"hello world"
        assert store.read("two") == source.read_bytes()
        entry = store.stat("two")
        assert entry is not None
        assert entry.bytes == 3_000_000
        assert abs(store.clock_s() - entry.modified_s) < 60
        assert [found.key for found in store.list()] == ["a/b/one", "two"]
        filesystem, root = store.arrow()
        with filesystem.open_input_file(f"{root}/a/b/one") as file:
            assert file.read() == b"hello world"

    def test_a_range_is_read_and_is_shorter_only_at_the_end(self, place: str) -> None:
        store = open_store(place)
        store.put("key", b"hello world")
        store.put("empty", b"")
        assert store.read_range("key", 6, 3) == b"wor"
        assert store.read_range("key", 9, 100) == b"ld"
        assert store.read_range("key", 11, 1) == b""
        assert store.read_range("key", 100, 1) == b""
        assert store.read_range("empty", 0, 10) == b""
        assert store.read("empty") == b""

    def test_put_if_absent_keeps_the_first_bytes_and_put_replaces_them(self, place: str) -> None:
        store = open_store(place)
        assert store.put("key", b"first")
        assert not store.put("key", b"first")
        assert not store.put("key", b"second")
        assert store.read("key") == b"first"
        assert store.put("key", b"third", if_absent=False)
        assert store.read("key") == b"third"
        assert list(store.list(temporary=True)) == []

    def test_a_file_of_many_parts_is_put_whole_or_refused(self, place: str, tmp_path: Path) -> None:
        store = open_store(place)
        source, other = tmp_path / "source", tmp_path / "other"
        source.write_bytes(random.Random(0).randbytes(40_000_000))
        other.write_bytes(bytes(40_000_000))
        assert store.put("big", source)
        assert not store.put("big", other)
        assert store.read("big") == source.read_bytes()
        assert store.read_range("big", 16 << 20, 100) == source.read_bytes()[16 << 20 : (16 << 20) + 100]
        assert store.put("big", other, if_absent=False)
        assert store.read("big") == other.read_bytes()
        assert list(store.list(temporary=True)) == []

    def test_listing_takes_any_prefix_in_key_order(self, place: str) -> None:
        store = open_store(place)
        assert list(store.list("nothing/here")) == []
        keys = ["data/00001-a.tar", "data/00010-a.tar", "data/deep/er", "dat", "receipts/00001.g0.json", "receipts.txt"]
        for key in keys:
            store.put(key, key.encode())
        assert [entry.key for entry in store.list()] == sorted(keys)
        assert [entry.key for entry in store.list("data/000")] == ["data/00001-a.tar", "data/00010-a.tar"]
        assert [entry.key for entry in store.list("rec")] == ["receipts.txt", "receipts/00001.g0.json"]
        assert [entry.bytes for entry in store.list("dat")] == [3, 16, 16, 12]

    def test_a_directory_is_no_object(self, place: str) -> None:
        store = open_store(place)
        store.put("a/b", b"")
        assert store.stat("a") is None
        assert store.stat("a/b") is not None
        assert store.stat("none") is None

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b"])
    def test_a_key_can_not_leave_the_root_or_have_two_spellings(self, place: str, key: str) -> None:
        with pytest.raises(ValueError, match="not a key"):
            open_store(place).put(key, b"")

    def test_missing_objects_raise_and_delete_forgives(self, place: str) -> None:
        store = open_store(place)
        with pytest.raises(FileNotFoundError) as missing:
            store.read("none")
        assert str(missing.value.filename).endswith("root/none")
        with pytest.raises(FileNotFoundError):
            store.read_range("none", 0, 1)
        store.delete("none")
        store.put("some", b"x")
        store.delete("some")
        assert store.stat("some") is None

    def test_a_failed_write_leaves_nothing(self, place: str, tmp_path: Path) -> None:
        store = open_store(place)
        with pytest.raises(FileNotFoundError):
            store.put("key", tmp_path / "no such source")
        assert list(store.list()) == []
        assert list(store.list(temporary=True)) == []

    def test_of_sixteen_racing_threads_one_wins_and_its_bytes_stay(self, place: str) -> None:
        store = open_store(place)
        for round in range(2):
            start = threading.Barrier(16)

            def write(writer: int, round: int = round, start: threading.Barrier = start) -> bool:
                start.wait()
                return store.put(f"folder-{round}/receipt", b"%d" % writer * 10_000)

            with ThreadPoolExecutor(16) as pool:
                won = list(pool.map(write, range(16)))
            assert sum(won) == 1
            assert store.read(f"folder-{round}/receipt") == b"%d" % won.index(True) * 10_000
        assert list(store.list(temporary=True)) == []

    def test_of_sixteen_racing_processes_one_wins_and_its_bytes_stay(self, place: str) -> None:
        """Forks of one process that has used the store: its connections are not shared."""
        raced = subprocess.run(
            [sys.executable, "-c", RACE, place], cwd=REPO, capture_output=True, text=True, timeout=120
        )
        won = dict(line.split() for line in raced.stdout.splitlines())
        assert len(won) == 16, raced.stderr
        store = open_store(place)
        for n in range(10):
            winners = [writer for writer, flags in won.items() if flags[n] == "1"]
            assert len(winners) == 1
            assert store.read(f"k/{n}") == winners[0].encode() * 1000

    def test_a_store_crosses_to_another_process(self, place: str) -> None:
        store = open_store(place)
        store.put("key", b"x")
        assert pickle.loads(pickle.dumps(store)).read("key") == b"x"

    def test_an_object_is_a_file_to_seek_in(self, place: str) -> None:
        store = open_store(place)
        data = random.Random(0).randbytes(200_000)
        store.put("lists/some.csv.gz", data)
        path = ObjectPath(store, "lists/some.csv.gz")
        assert (path.name, path.suffix, str(path)) == ("some.csv.gz", ".gz", f"{place}/lists/some.csv.gz")
        for buffering in (1, 1000):
            with path.open("rb", buffering) as file:
                assert file.read(10) == data[:10]
                assert file.seek(-7, os.SEEK_END) == 199_993
                assert file.read(100) == data[-7:]
                assert file.read(1) == b""
                file.seek(99_999)
                file.seek(1, os.SEEK_CUR)
                assert file.read() == data[100_000:]
        with pytest.raises(FileNotFoundError):
            ObjectPath(store, "none").open()


RACE = """
import os, sys
from infra.store import open_store
store = open_store(sys.argv[1])
store.put("warm", b"")
wait, go = os.pipe()
for n in range(16):
    if os.fork() == 0:
        me = chr(ord("a") + n)
        os.close(go)
        os.read(wait, 1)  # the parent lets go of the other end
        flags = "".join("01"[store.put(f"k/{key}", me.encode() * 1000)] for key in range(10))
        os.write(1, f"{me} {flags}\\n".encode())
        os._exit(0)
os.close(go)
for _ in range(16):
    os.wait()
"""


def test_leftovers_are_not_listed_with_the_rest(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("data/whole", b"")
    (tmp_path / "data" / f"{TEMPORARY}123-x").write_bytes(b"half")
    assert [entry.key for entry in store.list()] == ["data/whole"]
    assert [entry.key for entry in store.list("data/", temporary=True)] == [f"data/{TEMPORARY}123-x"]


def test_a_listing_that_can_not_be_read_is_an_error_and_not_empty(tmp_path: Path) -> None:
    (tmp_path / "receipts").symlink_to(tmp_path / "receipts")  # a directory that even root can't open
    with pytest.raises(OSError, match="receipts"):
        list(LocalStore(tmp_path).list("receipts/"))


# Kills itself before or after the n-th call of one function of os; a put that replaces calls os.replace by pathlib.
KILLED_PUT = """
import os, signal, sys
from pathlib import Path
name, when, count, root, if_absent = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5] == "1"
real, calls = getattr(os, name), 0
def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls == count and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **kwargs)
    if calls == count and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(os, name, killing)
from infra.store import LocalStore
LocalStore(Path(root)).put("receipts/00000.g0.json", b"n" * 100_000, if_absent=if_absent)
print("survived")
"""


@pytest.mark.parametrize("if_absent", [True, False])
@pytest.mark.parametrize(
    ("function", "call"), [("mkdir", 1), ("mkdir", 2), ("fsync", 1), ("fsync", 3), ("fsync", 4), ("publish", 1)]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_put_that_is_killed_at_any_call_leaves_the_whole_object_or_none(
    tmp_path: Path, function: str, call: int, when: str, if_absent: bool
) -> None:
    if function == "publish":
        function = "link" if if_absent else "replace"
    root = tmp_path / "pairs"
    command = [sys.executable, "-S", "-c", KILLED_PUT, function, when, str(call), str(root), "01"[if_absent]]
    killed = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    store = LocalStore(root)
    listed = [entry.key for entry in store.list()]
    assert listed in ([], ["receipts/00000.g0.json"])
    if listed:
        assert store.read(listed[0]) == b"n" * 100_000
    # The same command again: whole, whoever wrote it; leftovers are named for the sweep and for nobody else.
    again = LocalStore(root).put("receipts/00000.g0.json", b"n" * 100_000)
    assert again is (listed == [])
    assert store.read("receipts/00000.g0.json") == b"n" * 100_000
    assert len(list(store.list(temporary=True))) <= 1


def test_a_store_crosses_to_another_process_with_another_working_directory(tmp_path: Path) -> None:
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        store = open_store("runs/pairs")
        store.put("key", b"x")
        os.chdir("/")
        assert pickle.loads(pickle.dumps(store)).read("key") == b"x"
    finally:
        os.chdir(here)


def test_only_directories_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_store(str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"Use a local path or s3://bucket/prefix"):
        open_store("gopher://bucket/pairs")
    assert open_store(str(tmp_path / "not yet")).stat("key") is None
    assert not (tmp_path / "not yet").exists()


def test_places_are_joined_alike_for_paths_and_urls() -> None:
    assert join("runs/demo/", "pairs") == "runs/demo/pairs"
    assert join("s3://bucket/run", "pairs", "plan") == "s3://bucket/run/pairs/plan"
    assert join("s3://bucket", "pairs") == "s3://bucket/pairs"
    assert absolute("s3://bucket/run") == "s3://bucket/run"
    assert parent("s3://bucket/run/pairs/") == "s3://bucket/run"
    assert parent("runs/demo/pairs") == "runs/demo"
