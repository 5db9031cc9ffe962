"""A list that did not change is not read again, and one that did is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from infra.store import LocalStore, open_store
from ops import list_digests
from ops.list_digests import INDEX, Digested, digest_lists
from ops.lists import find_lists
from ops.recipes import sha256


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists need no minute of rest."""
    monkeypatch.setattr(list_digests, "SETTLED_S", -60.0)


def digests(store: LocalStore, *names: Path | str) -> list[Digested]:
    return digest_lists(store, find_lists([*map(str, names)])[0])


def remembered(store: LocalStore) -> Any:
    return list_digests._read(store)


def replace_remembered(store: LocalStore, digest: str) -> None:
    """Every list is remembered with this digest: who returns it has not read the list."""
    lists = {label: [*entry[:-1], digest] for label, entry in remembered(store).items()}
    store.put(INDEX, json.dumps({"format": 1, "lists": lists}).encode(), if_absent=False)


def test_a_list_that_did_not_change_is_not_read_again(tmp_path: Path, settled: None) -> None:
    store, folder = LocalStore(tmp_path / "pairs"), tmp_path / "lists"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"http://a/{name}\n")
    first = digests(store, folder)
    assert [one.sha256 for one in first] == [sha256((folder / name).read_bytes()) for name in ("a.txt", "b.txt")]
    assert digests(store, folder) == first
    replace_remembered(store, "feed")
    assert [one.sha256 for one in digests(store, folder)] == ["feed", "feed"]
    (folder / "c.txt").write_text("http://a/c\n")
    assert [one.sha256 for one in digests(store, folder)] == ["feed", "feed", sha256(b"http://a/c\n")]


def test_other_bytes_of_the_same_length_and_time_are_seen(tmp_path: Path, settled: None) -> None:
    store, path = LocalStore(tmp_path / "pairs"), tmp_path / "a.txt"
    path.write_text("http://a/1\n")
    status = path.stat()
    digests(store, path)
    path.write_text("http://a/2\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    [found] = digests(store, path)
    assert found.sha256 == sha256(b"http://a/2\n")


def test_a_digest_is_remembered_only_of_a_list_that_has_come_to_rest(tmp_path: Path) -> None:
    """A second write within the same tick of the clock would not show in its stamp."""
    store, path = LocalStore(tmp_path / "pairs"), tmp_path / "a.txt"
    path.write_text("http://a/1\n")
    digests(store, path)
    assert remembered(store) == {}
    assert list(store.list()) == []


def test_what_is_remembered_may_be_deleted_or_damaged(tmp_path: Path, settled: None) -> None:
    store, path = LocalStore(tmp_path / "pairs"), tmp_path / "a.txt"
    path.write_text("http://a/1\n")
    first = digests(store, path)
    for damage in (
        b"",
        b"{}",
        b"[]",
        b'{"format":2,"lists":{}}',
        b'{"format":1,"lists":{"%s":[1]}}' % str(path).encode(),
    ):
        store.put(INDEX, damage, if_absent=False)
        assert digests(store, path) == first
    store.delete(INDEX)
    assert digests(store, path) == first
    assert [*remembered(store)] == [str(path)]


def test_an_object_of_a_bucket_is_known_by_its_size_and_time(tmp_path: Path, bucket: str, settled: None) -> None:
    store, lists = LocalStore(tmp_path / "pairs"), open_store(f"{bucket}/lists")
    lists.put("a.txt", b"http://a/1\n")
    [first] = digests(store, f"{bucket}/lists")
    assert first.sha256 == sha256(b"http://a/1\n")
    replace_remembered(store, "feed")
    assert digests(store, f"{bucket}/lists")[0].sha256 == "feed"
    lists.put("a.txt", b"http://a/1\nhttp://a/2\n", if_absent=False)
    [second] = digests(store, f"{bucket}/lists")
    assert second.sha256 == sha256(b"http://a/1\nhttp://a/2\n")
