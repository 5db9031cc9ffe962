"""A URL is asked for once in all of a plan, and which row asks is decided by the rows alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.store import LocalStore, Store, open_store
from ops import url_duplicates
from ops.errors import DamagedArtifact
from ops.filters import FilterSettings
from ops.plan import Columns, Extension, Instalment, PlanSettings, extend_plan, read_instalments, read_work_order
from ops.shards import GRACE_S
from ops.sweep import sweep
from ops.url_duplicates import UrlDuplicates, UrlIndex, url_hashes
from ops.verify import verify

Rows = Sequence[tuple[str | None, str | None]]
"""URLs and captions."""
LISTED = [(f"http://a/{n % 40}.jpg", f"a picture, said the {n // 40}th time") for n in range(100)]
"""Forty URLs, twenty of them three times and twenty twice."""


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("url\tcaption\n" + "".join(f"{url or ''}\t{caption or ''}\n" for url, caption in rows))
    return path


def extend(store: Store, *lists: Path, unique_urls: bool = True) -> Extension:
    settings = PlanSettings(pairs_per_shard=16, unique_urls=unique_urls)
    return extend_plan(store, [*map(str, lists)], settings, FilterSettings(languages=()), Columns())


def planned(store: Store, instalments: Iterable[Instalment] | None = None) -> list[dict[str, object]]:
    """The rows of the plan, in its order."""
    orders = [order for part in instalments or read_instalments(store) for order in part.work_orders]
    return [row for order in orders for row in read_work_order(store, order).to_pylist()]


def verdicts(store: Store) -> dict[tuple[object, object], object]:
    return {(row["url"], row["caption"]): row["status"] for row in planned(store)}


def contents(store: LocalStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((store.root / "plan").iterdir())}


def the_index(store: Store, number: int = 0) -> UrlIndex:
    index = read_instalments(store)[number].urls
    assert index is not None
    return index


# --- within an instalment --------------------------------------------------------------------------------------------
def test_of_the_pairs_with_one_url_the_first_in_the_plan_is_asked_for_and_the_others_say_why_not(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path / "pairs")
    extend(store, write(tmp_path / "a.tsv", LISTED))
    rows = planned(store)
    assert Counter(row["url"] for row in rows) == Counter(url for url, _ in LISTED), "no row is lost"
    seen: set[object] = set()
    for row in rows:
        assert row["status"] == ("url_duplicate" if row["url"] in seen else None)
        seen.add(row["url"])
    assert the_index(store).urls == 40
    hashes = np.frombuffer(store.read(the_index(store).key), "<u8")
    assert hashes.tolist() == sorted(url_hashes(f"http://a/{n}.jpg".encode() for n in range(40)).tolist())


def test_a_bad_caption_does_not_kill_a_good_one_and_what_is_no_url_is_no_duplicate(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    good = [(f"http://a/{n}.jpg", "a small boat") for n in range(20)]
    bad = [(url, "x") for url, _ in good]
    extend(store, write(tmp_path / "a.tsv", [*bad, *good, (None, "a brown dog"), (None, "a white cat")]))
    assert verdicts(store) == {
        **dict.fromkeys(good, None),
        **dict.fromkeys(bad, "caption_short"),
        **dict.fromkeys([("", "a brown dog"), ("", "a white cat")], "url_invalid"),
    }


def test_a_pair_that_is_listed_twice_is_asked_for_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    a = write(tmp_path / "a.tsv", [("http://a/1", "the same tree")] * 2)
    b = write(tmp_path / "b.tsv", [("http://a/1", "the same tree"), ("http://a/2", "another tree")])
    extend(store, a, b)
    counts = Counter((row["url"], row["status"]) for row in planned(store))
    assert counts == {("http://a/1", None): 1, ("http://a/1", "url_duplicate"): 2, ("http://a/2", None): 1}


def test_neither_names_nor_pieces_nor_the_order_of_lists_decide_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LocalStore(tmp_path / "first")
    extend(first, write(tmp_path / "a.tsv", LISTED[:60]), write(tmp_path / "b.tsv", LISTED[60:]))
    monkeypatch.setattr(url_duplicates, "BLOCK_ROWS", 7)
    monkeypatch.setattr(url_duplicates, "BUCKET_ROWS", 3)
    other = LocalStore(tmp_path / "other")
    extend(other, write(tmp_path / "z" / "a.tsv", LISTED[60:]), write(tmp_path / "z" / "b.tsv", LISTED[:60]))
    orders = [part.work_orders for part in (*read_instalments(first), *read_instalments(other))]
    assert orders[0] == orders[1]
    assert the_index(first) == the_index(other)
    whole = LocalStore(tmp_path / "whole")
    extend(whole, write(tmp_path / "c.tsv", LISTED[::-1]))
    assert verdicts(whole) == verdicts(first), "nor how the rows are spread over lists"


KEYS = st.integers(0, 9).map(lambda n: n * 0x1999_9999_9999_9999)


@settings(deadline=None, max_examples=60)  # the first example pays for imports
@given(
    rows=st.lists(st.tuples(KEYS, st.integers(0, 3)), max_size=60),
    earlier=st.lists(st.sets(KEYS), max_size=3),
    block=st.integers(1, 20),
    bucket=st.integers(1, 20),
)
def test_the_buckets_find_what_one_look_at_all_rows_finds(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int]],
    earlier: list[set[int]],
    block: int,
    bucket: int,
) -> None:
    scratch = tmp_path_factory.mktemp("urls")
    store = LocalStore(scratch / "store")
    indexes = [put_index(store, number, sorted(hashes)) for number, hashes in enumerate(earlier)]
    before = set().union(*earlier)
    first: dict[int, tuple[int, int]] = {}
    for number, (key, uid) in enumerate(rows):
        first[key] = min(first.get(key, (uid, number)), (uid, number))
    stay = {number for key, (_, number) in first.items() if key not in before}
    with pytest.MonkeyPatch.context() as patch, UrlDuplicates(scratch) as duplicates:
        patch.setattr(url_duplicates, "BLOCK_ROWS", block)
        patch.setattr(url_duplicates, "BUCKET_ROWS", bucket)
        for start in range(0, len(rows), 11):
            keys, uids = (np.array(column, np.uint64) for column in zip(*rows[start : start + 11], strict=True))
            duplicates.add(keys, uids, np.arange(start, start + len(keys), dtype=np.uint64))
        lost, left = duplicates.find(store, indexes, len(rows), scratch / "index")
    found = lost.has(np.arange(len(rows), dtype=np.uint64))
    assert set(np.flatnonzero(~found).tolist()) == stay
    assert np.fromfile(scratch / "index", "<u8").tolist() == sorted(first.keys() - before)
    assert left == len(first.keys() - before)


def put_index(store: Store, number: int, hashes: list[int]) -> UrlIndex:
    data = np.array(hashes, "<u8").tobytes()
    key = f"plan/urls-{number:04d}.u64"
    store.put(key, data)
    return UrlIndex(key, len(hashes), url_duplicates.hashlib.sha256(data).hexdigest())


def test_ray_and_this_process_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    a, b = write(tmp_path / "a.tsv", LISTED), write(tmp_path / "b.tsv", [(url + "?b", text) for url, text in LISTED])
    here = LocalStore(tmp_path / "here")
    extend(here, a)
    extend(here, b, a)
    monkeypatch.setattr(url_duplicates, "BUCKET_ROWS", 20)
    monkeypatch.setattr(url_duplicates, "first_of_each", in_a_worker)
    spread = LocalStore(tmp_path / "spread")
    extend(spread, a)
    extend(spread, b, a)
    assert contents(here) == contents(spread)


def in_a_worker(bucket: url_duplicates.Bucket) -> tuple[url_duplicates.Numbers, url_duplicates.Numbers]:
    import ray

    assert ray.get_runtime_context().get_task_id(), "this process is a driver"
    return url_duplicates.first_of_each(bucket)


# --- over instalments ------------------------------------------------------------------------------------------------
def test_an_earlier_instalment_keeps_its_urls_and_those_it_rejected_are_free(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    extend(store, write(tmp_path / "a.tsv", [(f"http://a/{n}", "a small boat" if n < 20 else "x") for n in range(40)]))
    before = contents(store)
    later = [(f"http://a/{n}", f"a house with {k} doors") for n in range(10, 60) for k in range(2)]
    extend(store, write(tmp_path / "b.tsv", later))
    assert {name: data for name, data in contents(store).items() if name in before} == before
    rows = planned(store, read_instalments(store)[1:])
    asked = Counter(str(row["url"]) for row in rows if row["status"] is None)
    assert asked == Counter(f"http://a/{n}" for n in range(20, 60))
    assert Counter(row["status"] for row in rows)["url_duplicate"] == len(later) - 40
    extend(store, write(tmp_path / "c.tsv", [(f"http://a/{n}", "a bicycle") for n in range(61)]))
    assert [row["url"] for row in planned(store, read_instalments(store)[2:]) if row["status"] is None] == [
        "http://a/60"
    ], "the indexes of all instalments count"


def test_the_planner_that_loses_its_number_is_checked_against_the_winner(tmp_path: Path) -> None:
    a = write(tmp_path / "a.tsv", [(f"http://a/{n}", "from the winner") for n in range(30)])
    b = write(tmp_path / "b.tsv", [(f"http://a/{n}", "from the loser") for n in range(20, 50)])
    root = tmp_path / "pairs"

    class Overtaken(LocalStore):
        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            if key == "plan/part-0000.json":
                extend(LocalStore(root), a)
            return super().put(key, data, if_absent=if_absent)

    extend(Overtaken(root), b)
    asked = Counter(row["url"] for row in planned(LocalStore(root)) if row["status"] is None)
    assert asked == Counter(f"http://a/{n}" for n in range(50))
    assert the_index(LocalStore(root), 1).urls == 20


def test_a_damaged_index_stops_the_next_instalment_and_verify_names_it(tmp_path: Path) -> None:
    root = tmp_path / "pairs"
    store = LocalStore(root)
    extend(store, write(tmp_path / "a.tsv", LISTED))
    b = write(tmp_path / "b.tsv", [("http://b/1", "a small boat")])
    index = the_index(store)
    whole = store.read(index.key)
    assert verify(store, deep=True).ok
    for bytes, deep, what in (
        (whole[:-1] + b"x", True, "sha256"),
        (whole[:-8], False, "has 312 bytes, its instalment says 320"),
        (None, False, "is missing"),
    ):
        store.delete(index.key)
        if bytes is not None:
            store.put(index.key, bytes)
        with pytest.raises(DamagedArtifact, match=index.key):
            extend(store, b)
        assert len(read_instalments(store)) == 1
        [problem] = verify(store, deep=deep).problems
        assert problem.shard is None
        assert what in problem.what
    store.put(index.key, whole)
    assert extend(store, b).instalment is not None
    assert verify(store, deep=True).ok


def test_sweep_keeps_the_index_of_an_instalment_and_takes_that_of_a_planner_that_died(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    extend(store, write(tmp_path / "a.tsv", LISTED))
    store.put("plan/urls-0001-0123456789abcdef.u64", b"12345678")
    for path in (store.root / "plan").iterdir():
        os.utime(path, (store.clock_s() - GRACE_S - 60,) * 2)
    assert sweep(store) == ["plan/urls-0001-0123456789abcdef.u64"]
    assert verify(store, deep=True).ok


def test_a_url_may_be_asked_for_again_where_the_settings_say_so(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    extension = extend(store, write(tmp_path / "a.tsv", LISTED), unique_urls=False)
    assert extension.instalment is not None
    assert extension.instalment.urls is None
    assert {row["status"] for row in planned(store)} == {None}
    assert not [entry.key for entry in store.list("plan/urls-")]


def test_an_index_is_kept_in_a_bucket_too(tmp_path: Path, bucket: str) -> None:
    store = open_store(bucket)
    extend(store, write(tmp_path / "a.tsv", LISTED))
    extend(store, write(tmp_path / "b.tsv", [("http://a/1.jpg", "once more"), ("http://b/1.jpg", "a new one")]))
    assert {
        str(url): status for (url, text), status in verdicts(store).items() if text in ("once more", "a new one")
    } == {
        "http://a/1.jpg": "url_duplicate",
        "http://b/1.jpg": None,
    }
