"""The plan: every row of a list stands once, in the same bytes wherever it is planned, whoever dies or races."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from infra.store import TEMPORARY, LocalStore, Store, open_store
from ops import lists, plan, uid_sort, url_duplicates
from ops.errors import BadList, DamagedArtifact, StorageError, UnknownFormat, UsageError
from ops.filters import FilterSettings
from ops.plan import (
    Columns,
    Extension,
    Instalment,
    PlanSettings,
    extend_plan,
    pair_uid,
    read_instalments,
    read_work_order,
    would_grow,
)

REPO = Path(__file__).parents[2]
SMALL = PlanSettings(pairs_per_shard=100)
BY_NAME = Columns()


def write_tsv(path: Path, start: int, count: int) -> Path:
    rows = [f"http://host{n % 7}.example/{n}.jpg\ta boat with {n} sails\n" for n in range(start, start + count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("url\tcaption\n" + "".join(rows))
    return path


def extend(
    store: Store, *names: Path, settings: PlanSettings = SMALL, filters: FilterSettings | None = None
) -> Extension:
    return extend_plan(store, [str(name) for name in names], settings, filters or FilterSettings(), BY_NAME)


def tables(store: Store, instalments: Iterable[Instalment] | None = None) -> list[pa.Table]:
    instalments = read_instalments(store) if instalments is None else instalments
    return [read_work_order(store, order) for instalment in instalments for order in instalment.work_orders]


def places(store: Store) -> Iterator[tuple[str, tuple[int, int]]]:
    """Of each row its URL, and its `list_number` and `list_line` in the file of the work order."""
    for order in (order for instalment in read_instalments(store) for order in instalment.work_orders):
        rows = pq.read_table(pa.BufferReader(store.read(order.key))).to_pylist()
        yield from ((row["url"], (row["list_number"], row["list_line"])) for row in rows)


def urls(store: Store) -> Counter[str]:
    return Counter(url for table in tables(store) for url in table["url"].to_pylist())


def numbers(*ranges: tuple[int, int]) -> Counter[str]:
    return Counter(
        f"http://host{n % 7}.example/{n}.jpg" for start, count in ranges for n in range(start, start + count)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "plan").iterdir())}


# --- what a plan is --------------------------------------------------------------------------------------------------
def test_every_row_of_the_list_stands_once_with_its_key_and_uid(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    extension = extend(store, write_tsv(tmp_path / "a.tsv", 0, 250))
    assert extension.instalment is not None
    assert extension.instalments == (extension.instalment,) == tuple(read_instalments(store))
    assert [order.rows for order in extension.instalment.work_orders] == [100, 100, 50]
    assert extension.instalment.rows == 250
    assert urls(store) == numbers((0, 250))
    rows = [row for table in tables(store) for row in table.to_pylist()]
    assert [row["key"] for row in rows] == [f"{n // 100:05d}{n % 100:04d}" for n in range(250)]
    for row in rows:
        assert row["uid"] == hashlib.blake2b(f"{row['url']}\0{row['caption']}".encode(), digest_size=16).hexdigest()
        assert (row["status"], row["detail"], row["weight"]) == (None, None, 1.0)
    assert " ".join(tables(store)[0].column_names) == (
        "key uid url caption split weight status detail language language_probability"
    )


def test_keys_grow_with_shards_of_more_than_ten_thousand(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    extend(store, write_tsv(tmp_path / "a.tsv", 0, 3), settings=PlanSettings(pairs_per_shard=100_000))
    assert tables(store)[0]["key"].to_pylist() == ["0000000000", "0000000001", "0000000002"]


def test_rows_are_ordered_by_uid_so_that_no_shard_is_one_host(tmp_path: Path) -> None:
    path = tmp_path / "grouped.tsv"
    path.write_text("url\tcaption\n" + "".join(f"http://h{n // 200}/{n}\tsome words\n" for n in range(1000)))
    store = LocalStore(tmp_path / "pairs")
    extend(store, path, settings=PlanSettings(pairs_per_shard=200))
    uids = [uid for table in tables(store) for uid in table["uid"].to_pylist()]
    assert uids == sorted(uids)
    for table in tables(store):
        assert len({url.split("/")[2] for url in table["url"].to_pylist()}) == 5


def test_the_split_is_by_uid_in_every_shard_and_the_lists_own_word_counts_more(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    settings = PlanSettings(pairs_per_shard=1000, held_out=0.1)
    extend(store, write_tsv(tmp_path / "a.tsv", 0, 5000), settings=settings)
    shares = [table["split"].to_pylist().count("held_out") / len(table) for table in tables(store)]
    assert all(0.06 < share < 0.14 for share in shares)  # 4.2 standard deviations
    first = {row["uid"]: row["split"] for table in tables(store) for row in table.to_pylist()}
    other = LocalStore(tmp_path / "other")
    extend(other, write_tsv(tmp_path / "b.tsv", 2500, 5000), settings=settings)
    second = {row["uid"]: row["split"] for table in tables(other) for row in table.to_pylist()}
    assert len(first.keys() & second.keys()) == 2500
    assert all(first[uid] == second[uid] for uid in first.keys() & second.keys())
    path = tmp_path / "c.tsv"
    rows = [f"u{n}\tsome words\t{('train', 'held_out', '')[n % 3]}\t{(0.25, '')[n % 2]}\n" for n in range(600)]
    path.write_text("url\tcaption\tsplit\tweight\n" + "".join(rows))
    own = LocalStore(tmp_path / "own")
    extend(own, path, settings=settings)
    for row in (row for table in tables(own) for row in table.to_pylist()):
        n = int(row["url"][1:])
        assert row["weight"] == (0.25, 1.0)[n % 2]
        if n % 3 < 2:
            assert row["split"] == ("train", "held_out")[n % 3]
    assert {row["split"] for table in tables(own) for row in table.to_pylist() if int(row["url"][1:]) % 3 == 2} == {
        "train",
        "held_out",
    }


def test_a_rejected_row_stays_in_its_work_order_with_the_verdict(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"url": "http://a/fine", "caption": "a cat"}',
        b'{"url": "http://a/missing", "caption": null}',
        b'{"url": "http://a/empty", "caption": ""}',
        b'{"url": "http://a/short", "caption": "x"}',
        b'{"url": "http://a/bytes", "caption": "caf\xe9"}',
        b'{"url": null, "caption": "a dog"}',
        b'{"url": "", "caption": "a dog"}',
        b'{"url": "http://a/\xff", "caption": "a bird"}',
    ]
    path.write_bytes(b"\n".join(lines))
    store = LocalStore(tmp_path / "pairs")
    extend(store, path)
    rows = {(row["url"], row["caption"]): row for row in tables(store)[0].to_pylist()}
    verdicts = {pair: (row["status"], row["detail"]) for pair, row in rows.items()}
    assert verdicts == {
        ("http://a/fine", "a cat"): (None, None),
        ("http://a/missing", None): ("caption_missing", None),
        ("http://a/empty", ""): ("caption_missing", None),
        ("http://a/short", "x"): ("caption_short", None),
        ("http://a/bytes", "caf\\xe9"): ("caption_encoding", "not UTF-8"),
        (None, "a dog"): ("url_invalid", "no URL"),
        ("", "a dog"): ("url_invalid", "no URL"),
        ("http://a/\\xff", "a bird"): ("url_invalid", "not UTF-8"),
    }
    assert rows["http://a/bytes", "caf\\xe9"]["uid"] == pair_uid(b"http://a/bytes", b"caf\xe9").hex()
    assert len({row["uid"] for row in rows.values()}) == len(lines)


def test_a_list_of_urls_is_planned_where_no_caption_is_required(tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("http://a/1\nhttp://a/2\n")
    store = LocalStore(tmp_path / "pairs")
    with pytest.raises(BadList, match="captions are required"):
        extend(store, path)
    extend(store, path, filters=FilterSettings(caption_required=False))
    assert tables(store)[0]["caption"].to_pylist() == [None, None]
    assert tables(store)[0]["status"].to_pylist() == [None, None]


def test_a_pair_that_stands_twice_in_a_list_is_planned_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.tsv"
    path.write_text("url\tcaption\tn\nu\tsome words\t1\nv\tsome words\t2\nu\tsome words\t3\n")
    store = LocalStore(tmp_path / "pairs")
    extend(store, path)
    rows = tables(store)[0].to_pylist()
    assert Counter(row["url"] for row in rows) == {"u": 2, "v": 1}
    assert [row["n"] for row in rows if row["url"] == "u"] == ["1", "3"]


# --- columns of the user ---------------------------------------------------------------------------------------------
def test_lists_with_different_columns_are_united_with_nulls(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["p"], "caption": ["some words"], "n": [7], "score": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"url": "j", "caption": "some words", "score": 0.5, "tags": ["x"]}\n')
    (tmp_path / "c.tsv").write_text("url\tcaption\tsubset\nt\tsome words\tz\n")
    store = LocalStore(tmp_path / "pairs")
    extend(store, tmp_path / "a.parquet", tmp_path / "b.jsonl", tmp_path / "c.tsv")
    [table] = tables(store)
    got = {row["url"]: (row["n"], row["score"], row["tags"], row["subset"]) for row in table.to_pylist()}
    assert got == {"p": (7, 1.0, None, None), "j": (None, 0.5, ["x"], None), "t": (None, None, None, "z")}
    assert table.schema.field("n").type == pa.int64()
    assert table.schema.field("score").type == pa.float64()


def test_columns_whose_types_conflict_are_a_bad_list(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["p"], "caption": ["some words"], "n": [7]}), tmp_path / "a.parquet")
    (tmp_path / "b.tsv").write_text("url\tcaption\tn\nt\tsome words\tz\n")
    store = LocalStore(tmp_path / "pairs")
    with pytest.raises(BadList, match=r"column 'n' holds (string|int64) here and (int64|string) in the rows or lists"):
        extend(store, tmp_path / "a.parquet", tmp_path / "b.tsv")
    big = pa.table({"url": ["p"], "caption": ["some words"], "n": [(1 << 53) + 1]})
    pq.write_table(big, tmp_path / "c.parquet")
    pq.write_table(pa.table({"url": ["q"], "caption": ["some words"], "n": [0.5]}), tmp_path / "d.parquet")
    with pytest.raises(BadList, match="column 'n' holds int64 in some rows and can't be read as double"):
        extend(store, tmp_path / "c.parquet", tmp_path / "d.parquet")
    assert read_instalments(store) == []


# --- the same list, the same bytes -----------------------------------------------------------------------------------
def test_the_same_lists_give_the_same_bytes_whatever_the_pieces_and_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write_tsv(tmp_path / "a.tsv", 0, 700), write_tsv(tmp_path / "b.tsv", 500, 600)
    pq.write_table(pa.table({"url": ["p"], "caption": ["some words"], "n": [7]}), tmp_path / "c.parquet")
    c = tmp_path / "c.parquet"
    extend(LocalStore(tmp_path / "one"), a, b, c)
    monkeypatch.setattr(lists, "BATCH_ROWS", 64)
    monkeypatch.setattr(uid_sort, "RUN_ROWS", 150)
    monkeypatch.setattr(uid_sort, "BUCKET_BYTES", 2000)
    monkeypatch.setattr(url_duplicates, "BLOCK_ROWS", 170)
    monkeypatch.setattr(url_duplicates, "BUCKET_ROWS", 60)
    extend(LocalStore(tmp_path / "two"), c, b, a)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert urls(LocalStore(tmp_path / "one")) == numbers((0, 700), (500, 600)) + Counter(["p"])


def test_the_same_list_gives_the_same_bytes_in_another_process(tmp_path: Path, planners: Planners) -> None:
    path = write_tsv(tmp_path / "a.tsv", 0, 300)
    extend(LocalStore(tmp_path / "one"), path)
    assert planners.run([job(tmp_path / "two", path)])[0][0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_all_formats_of_one_list_give_the_same_rows_and_each_its_own_lines(tmp_path: Path) -> None:
    tsv = write_tsv(tmp_path / "a.tsv", 0, 250)
    rows = [line.split("\t") for line in tsv.read_text().splitlines()[1:]]
    objects = [{"url": url, "caption": caption} for url, caption in rows]
    (tmp_path / "a.csv").write_text(tsv.read_text().replace("\t", ","))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, objects)))
    (tmp_path / "a.json").write_text(json.dumps(objects))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    pq.write_table(pa.table({"url": [u for u, _ in rows], "caption": [c for _, c in rows]}), tmp_path / "a.parquet")
    first = {"a.tsv": 2, "a.csv": 2, "a.csv.gz": 2, "a.jsonl": 1, "a.json": 1, "a.parquet": 1}
    made: list[list[pa.Table]] = []
    for name, line in first.items():
        store = LocalStore(tmp_path / name.replace(".", "-"))
        extend(store, tmp_path / name)
        made.append(tables(store))
        for url, place in places(store):
            row = int(url.rpartition("/")[2].removesuffix(".jpg"))
            assert place == (0, line + (0 if name == "a.json" else row)), name  # json.dumps writes one line
    assert all(rows == made[0] for rows in made)


def test_the_place_of_a_row_names_its_list_and_line_and_reaches_no_sidecar(tmp_path: Path) -> None:
    """The line is the one an error would name, and `list_number` counts the lists in the order of their digests."""
    (tmp_path / "a.csv").write_text('url,caption\nu1,"two\nlines"\n\nu2,"one ""line"""\n')
    (tmp_path / "b.tsv").write_text("url\tcaption\tlist_line\nu3\tsome words\tmine\n")
    store = LocalStore(tmp_path / "pairs")
    instalment = extend(store, tmp_path / "a.csv", tmp_path / "b.tsv").instalment
    assert instalment is not None
    found = {url: (Path(instalment.lists[number].label).name, line) for url, (number, line) in places(store)}
    assert found == {"u1": ("a.csv", 2), "u2": ("a.csv", 5), "u3": ("b.tsv", 2)}
    [table] = tables(store)
    assert not {"list_number", "list_line"} & set(table.column_names)
    assert {row["url"]: row["list_list_line"] for row in table.to_pylist()} == {"u1": None, "u2": None, "u3": "mine"}


# --- instalments -----------------------------------------------------------------------------------------------------
def test_the_same_bytes_add_nothing_wherever_they_lie(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    path = write_tsv(tmp_path / "a.tsv", 0, 250)
    extend(store, path)
    before = contents(tmp_path / "pairs")
    copy = tmp_path / "elsewhere" / "of-another-name.tsv"
    copy.parent.mkdir()
    path.rename(copy)
    extension = extend(store, copy)
    assert extension.instalment is None
    assert extension.skipped == (str(copy),)
    assert contents(tmp_path / "pairs") == before
    twin = tmp_path / "twin.tsv"
    twin.write_bytes(copy.read_bytes())
    other = LocalStore(tmp_path / "other")
    extension = extend(other, copy, twin)
    assert len(extension.skipped) == 1
    assert urls(other) == numbers((0, 250))


def test_a_new_list_extends_the_plan_even_one_that_sorts_earlier(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    folder = tmp_path / "lists"
    write_tsv(folder / "m.tsv", 0, 250)
    first = extend(store, folder).instalment
    before = contents(tmp_path / "pairs")
    write_tsv(folder / "a.tsv", 1000, 120)
    extension = extend(store, folder)
    second = extension.instalment
    assert first is not None
    assert second is not None
    assert (second.number, second.first_shard) == (1, 3)
    assert [order.shard for order in second.work_orders] == [3, 4]
    assert extension.instalments == (first, second)
    assert extension.skipped == (str(folder / "m.tsv"),)
    after = contents(tmp_path / "pairs")
    assert {name: after[name] for name in before} == before
    assert urls(store) == numbers((0, 250), (1000, 120))
    keys = [key for table in tables(store) for key in table["key"].to_pylist()]
    assert len(set(keys)) == len(keys)


def test_a_watched_prefix_grows_shrinks_and_moves_and_every_list_is_planned_once(tmp_path: Path, place: str) -> None:
    """The same on disk and in a bucket: new files, one that sorts earlier, one that moved, one whose bytes changed."""
    lists, store = open_store(f"{place}/lists"), open_store(f"{place}/pairs")

    def put(name: str, start: int, count: int) -> None:
        lists.put(name, write_tsv(tmp_path / "one.tsv", start, count), if_absent=False)

    def extend_by_prefix() -> Extension:
        return extend_plan(store, [f"{place}/lists"], SMALL, FilterSettings(), BY_NAME)

    def planned(extension: Extension) -> list[str]:
        lists = extension.instalment.lists if extension.instalment else ()
        return sorted(file.label.removeprefix(f"{place}/lists/") for file in lists)

    put("2026/m.tsv", 0, 150)
    first = extend_by_prefix()
    assert planned(first) == ["2026/m.tsv"]
    put("2025/a.tsv", 1000, 20)  # sorts earlier
    put("2026/n.tsv", 2000, 120)
    second = extend_by_prefix()
    assert planned(second) == ["2025/a.tsv", "2026/n.tsv"]
    assert second.instalment is not None
    assert second.instalment.first_shard == 2
    assert second.instalments[:1] == first.instalments
    lists.delete("2026/m.tsv")
    put("archive/m.tsv", 0, 150)  # moved
    put("2026/n.tsv", 2000, 121)  # changed
    put("2026/o.tsv", 2000, 120)  # the bytes that n had
    third = extend_by_prefix()
    assert planned(third) == []
    assert third.changed == (f"{place}/lists/2026/n.tsv",)
    assert urls(store) == numbers((0, 150), (1000, 20), (2000, 120))
    lists.delete("2025/a.tsv")  # what was planned stays planned
    put("2026/p.tsv", 3000, 10)
    assert planned(extend_by_prefix()) == ["2026/p.tsv"]
    assert urls(store) == numbers((0, 150), (1000, 20), (2000, 120), (3000, 10))


def test_a_list_is_not_planned_again_with_other_columns_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("url\tcaption\tTEXT\nhttp://a/1\tin English\tthe same in words\n")
    store = LocalStore(tmp_path / "pairs")
    extend(store, path)
    with pytest.raises(UsageError) as refused:
        extend_plan(store, [str(path)], SMALL, FilterSettings(), Columns(caption="TEXT"))
    assert "--url-col url --caption-col caption, now they are url and TEXT" in str(refused.value)
    assert not would_grow(store, [str(path)], read_instalments(store), BY_NAME)
    with pytest.raises(UsageError):
        would_grow(store, [str(path)], read_instalments(store), Columns(caption="TEXT"))
    other = tmp_path / "b.tsv"
    other.write_text("url\tTEXT\nhttp://a/2\tanother tree\n")
    assert would_grow(store, [str(other)], read_instalments(store), Columns(caption="TEXT"))
    extend_plan(store, [str(other)], SMALL, FilterSettings(), Columns(caption="TEXT"))
    assert [[file.columns for file in part.lists] for part in read_instalments(store)] == [
        [Columns()],
        [Columns(caption="TEXT")],
    ]


def test_a_changed_file_of_a_watched_folder_is_skipped_and_named_but_a_named_one_is_new(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    folder = tmp_path / "lists"
    write_tsv(folder / "a.tsv", 0, 50)
    extend(store, folder)
    write_tsv(folder / "a.tsv", 0, 60)
    write_tsv(folder / "b.tsv", 1000, 10)
    extension = extend(store, folder)
    assert extension.changed == (str(folder / "a.tsv"),)
    assert urls(store) == numbers((0, 50), (1000, 10))
    assert extend(store, folder).changed == (str(folder / "a.tsv"),)
    assert extend(store, folder / "a.tsv").changed == ()
    assert urls(store) == numbers((0, 50), (1000, 10), (0, 60))


def test_a_bad_row_plans_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    good, bad = write_tsv(tmp_path / "good.tsv", 0, 250), write_tsv(tmp_path / "bad.tsv", 0, 40_000)
    with bad.open("a") as file:
        file.write("http://a\ttoo\tmany\n")
    with pytest.raises(BadList, match=r"bad.tsv, line 40002: has 3 fields"):
        extend(store, good, bad)
    assert list(store.list()) == []


def test_a_list_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tsv(tmp_path / "a.tsv", 0, 250)
    store = LocalStore(tmp_path / "pairs")
    really = plan.read_rows

    def appended(*args: object, **kwargs: object) -> object:
        yield from really(*args, **kwargs)  # type: ignore[arg-type]
        with path.open("a") as file:
            file.write("http://late\tsome words\n")

    monkeypatch.setattr(plan, "read_rows", appended)
    with pytest.raises(BadList, match="changed while it was read"):
        extend(store, path)
    assert read_instalments(store) == []


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "pairs")
    for part in range(3):
        extend(store, write_tsv(tmp_path / f"{part}.tsv", 1000 * part, 150))
    whole = contents(tmp_path / "pairs")
    order = read_instalments(store)[1].work_orders[0]
    folder = tmp_path / "pairs" / "plan"

    (tmp_path / "pairs" / order.key).write_bytes(b"x" + whole[Path(order.key).name][1:])
    with pytest.raises(DamagedArtifact, match=order.key):
        read_work_order(store, order)
    (tmp_path / "pairs" / order.key).unlink()
    with pytest.raises(DamagedArtifact, match=r"found no file"):
        read_work_order(store, order)

    (folder / "part-0001.json").unlink()
    with pytest.raises(DamagedArtifact, match=r"part-0001.json is damaged: an instalment was recorded"):
        read_instalments(store)
    for altered in (whole["part-0001.json"].replace(b"150", b"151"), whole["part-0000.json"]):
        (folder / "part-0001.json").write_bytes(altered)
        with pytest.raises(DamagedArtifact, match=r"part-000[01].json is damaged: sha256"):
            read_instalments(store)
    for altered in (b"", b"[]", b'{"format": 1}'):
        (folder / "part-0001.json").write_bytes(altered)
        with pytest.raises(DamagedArtifact, match=r"part-0001.json is damaged"):
            read_instalments(store)
    (folder / "part-0001.json").write_bytes(whole["part-0001.json"].replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(UnknownFormat, match="format 2"):
        read_instalments(store)
    (folder / "part-0001.json").write_bytes(whole["part-0001.json"])
    assert len(read_instalments(store)) == 3


def test_work_orders_that_vanish_before_the_instalment_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep with the wrong clock, or a hand: an instalment never names what is not there."""

    class Forgetful(LocalStore):
        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            put = super().put(key, data, if_absent=if_absent)
            if key.startswith("plan/00001"):
                self.delete(key)
            return put

    store = Forgetful(tmp_path / "pairs")
    with pytest.raises(StorageError, match=r"plan/00001-.* was removed"):
        extend(store, write_tsv(tmp_path / "a.tsv", 0, 250))
    assert read_instalments(store) == []


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"pairs_per_shard": 0}, {"held_out": 1.0}, {"held_out": -0.1}, {"pairs_per_shards": 5}):
        with pytest.raises(ValidationError):
            PlanSettings(**wrong)  # type: ignore[arg-type]


def test_a_null_is_told_from_an_empty_text_and_no_text_collides_with_it() -> None:
    texts = [None, b"", b"\0", b"a", b"a\0", b"\0a"]
    uids = {(url, caption): pair_uid(url, caption) for url in texts for caption in texts}
    nulls = {pair: uid for pair, uid in uids.items() if None in pair}
    assert len(set(nulls.values())) == len(nulls)
    assert not set(nulls.values()) & {uid for pair, uid in uids.items() if None not in pair}


# --- kills and races -------------------------------------------------------------------------------------------------
# Imports once, then forks a planner for each job of a line, one after the other or all at once, and reports how each
# ended and what memory it took. A job's kill, e.g. "fsync:before:3", dies before the third os.fsync.
PLANNERS = """
import json, os, signal, sys
from pathlib import Path
import pyarrow
import ops.lists, ops.uid_sort, ops.url_duplicates
from infra.store import LocalStore
from ops.filters import FilterSettings
from ops.plan import Columns, PlanSettings, extend_plan

pyarrow.array(["x"]).cast(pyarrow.binary())  # pyarrow imports pandas here, a second for each child otherwise

def arm(name, when, count):
    real, calls = getattr(os, name), 0
    def killing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == int(count) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == int(count) and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(os, name, killing)

def run(job):
    if job["kill"]:
        arm(*job["kill"].split(":"))
    if job["small_pieces"]:
        ops.lists.BATCH_ROWS, ops.uid_sort.RUN_ROWS, ops.uid_sort.BUCKET_BYTES = 4096, 8192, 1 << 18
        ops.url_duplicates.BLOCK_ROWS = ops.url_duplicates.BUCKET_ROWS = 8192
    settings = PlanSettings(pairs_per_shard=10_000 if job["small_pieces"] else 100)
    extend_plan(LocalStore(Path(job["root"])), job["lists"], settings, FilterSettings(), Columns())

for line in sys.stdin:
    order = json.loads(line)
    ends, children = [], []
    def collect():
        for child in children:
            _, status, usage = os.wait4(child, 0)
            ends.append([os.waitstatus_to_exitcode(status), usage.ru_maxrss // 1024])
        children.clear()
    gate, opened = os.pipe()
    for job in order["jobs"]:
        child = os.fork()
        if not child:
            os.close(opened)
            try:
                if order["at_once"]:
                    os.read(gate, 1)  # returns when the parent closes its end
                run(job)
                os._exit(0)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        children.append(child)
        if not order["at_once"]:
            collect()
    os.close(opened)
    collect()
    os.close(gate)
    print(json.dumps(ends), flush=True)
"""


class Planners:
    """Planners that may be killed, in processes of their own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, jobs: list[dict[str, object]], *, at_once: bool = False) -> list[tuple[int, int]]:
        """The exit code (negative: the signal) and the peak memory in MB of each job."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"jobs": jobs, "at_once": at_once}) + "\n")
        self.process.stdin.flush()
        return [(code, peak) for code, peak in json.loads(self.process.stdout.readline())]


def job(root: Path, *lists: Path, kill: str = "", small_pieces: bool = False) -> dict[str, object]:
    return {"root": str(root), "lists": [*map(str, lists)], "kill": kill, "small_pieces": small_pieces}


@pytest.fixture(scope="module")
def planners() -> Iterator[Planners]:
    command = [sys.executable, "-c", PLANNERS]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Planners(process)
        assert process.stdin is not None
        process.stdin.close()


# An index, two work orders and an instalment: four links, four fsyncs of files, four of directories (+ two new ones).
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("function", ["fsync", "link"])
def test_a_planner_killed_at_any_write_loses_and_doubles_nothing(
    tmp_path: Path, planners: Planners, function: str, when: str
) -> None:
    path = write_tsv(tmp_path / "a.tsv", 0, 150)
    extend(LocalStore(tmp_path / "whole"), path)
    expected = contents(tmp_path / "whole")
    calls = {"link": 4, "fsync": 10}[function]
    ends = planners.run(
        [job(tmp_path / str(call), path, kill=f"{function}:{when}:{call}") for call in range(1, calls + 2)]
    )
    assert [code for code, _ in ends] == [-signal.SIGKILL] * calls + [0]
    for call in range(1, calls + 1):
        store = LocalStore(tmp_path / str(call))
        assert urls(store) in (numbers(), numbers((0, 150)))  # all of the list or nothing
        extend(store, path)
        assert urls(store) == numbers((0, 150))
        there = contents(tmp_path / str(call))
        assert {key: data for key, data in there.items() if not key.startswith(TEMPORARY)} == expected


def test_a_list_planned_after_a_killed_planner_takes_its_shards(tmp_path: Path, planners: Planners) -> None:
    """Work orders that no instalment names do not exist: their numbers are free for another list."""
    a, b = write_tsv(tmp_path / "a.tsv", 0, 150), write_tsv(tmp_path / "b.tsv", 1000, 150)
    root = tmp_path / "pairs"
    assert planners.run([job(root, a, kill="link:before:4")])[0][0] == -signal.SIGKILL
    store = LocalStore(root)
    orphans = {entry.key for entry in store.list("plan/")}
    assert len(orphans) == 3
    assert read_instalments(store) == []
    extend(store, b)
    assert urls(store) == numbers((1000, 150))
    extend(store, a)
    assert urls(store) == numbers((1000, 150), (0, 150))
    shards = [order.shard for instalment in read_instalments(store) for order in instalment.work_orders]
    assert shards == [0, 1, 2, 3]


def test_leftover_work_orders_are_made_young_again(tmp_path: Path, planners: Planners) -> None:
    """Else a sweep could take them for old between the planner's look and its instalment."""
    path = write_tsv(tmp_path / "a.tsv", 0, 150)
    root = tmp_path / "pairs"
    planners.run([job(root, path, kill="link:before:4")])
    store = LocalStore(root)
    leftovers = [entry.key for entry in store.list("plan/")]
    assert len(leftovers) == 3
    for key in leftovers:
        os.utime(root / key, (1, 1))
    extend(store, path)
    assert all(entry.modified_s > store.clock_s() - 600 for entry in store.list("plan/"))


def test_scratch_of_a_killed_planner_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()

    class Killed(LocalStore):
        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            shutil.copytree(tmp_path / "scratch", tmp_path / "left")  # what a SIGKILL at this moment would leave
            raise OSError("killed here")

    a = write_tsv(tmp_path / "a.tsv", 0, 150)
    with pytest.raises(OSError, match="killed here"):
        extend(Killed(tmp_path / "pairs"), a)
    left = tmp_path / "left"
    assert list(left.rglob("runs.arrow")), "the spill"
    for path in left.rglob("*"):
        os.utime(path, (1, 1))
    monkeypatch.setattr(tempfile, "tempdir", str(left))
    extend(LocalStore(tmp_path / "pairs"), a)
    assert list(left.iterdir()) == []


@pytest.mark.parametrize("same", [True, False])
def test_four_planners_at_once_plan_every_list_once(tmp_path: Path, planners: Planners, same: bool) -> None:
    paths = [write_tsv(tmp_path / f"{n}.tsv", 1000 * n, 250) for n in range(4)]
    root = tmp_path / "pairs"
    jobs = [job(root, *(paths if same else [paths[n], paths[(n + 1) % 4]])) for n in range(4)]
    assert [code for code, _ in planners.run(jobs, at_once=True)] == [0] * 4
    store = LocalStore(root)
    assert urls(store) == numbers(*((1000 * n, 250) for n in range(4)))
    planned = [planned.label for instalment in read_instalments(store) for planned in instalment.lists]
    assert sorted(planned) == sorted(map(str, paths))


def test_a_planner_that_loses_its_number_plans_the_rest_under_the_next(tmp_path: Path) -> None:
    a, b = write_tsv(tmp_path / "a.tsv", 0, 150), write_tsv(tmp_path / "b.tsv", 1000, 150)
    root = tmp_path / "pairs"

    class Overtaken(LocalStore):
        """Another planner's instalment lands just before ours."""

        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            if key == "plan/part-0000.json":
                extend(LocalStore(root), a)
            return super().put(key, data, if_absent=if_absent)

    extension = extend(Overtaken(root), a, b)
    assert extension.instalment is not None
    assert (extension.instalment.number, extension.instalment.first_shard) == (1, 2)
    assert [planned.label for planned in extension.instalment.lists] == [str(b)]
    assert extension.skipped == (str(a),)
    assert urls(LocalStore(root)) == numbers((0, 150), (1000, 150))
    assert extend(Overtaken(tmp_path / "same"), a).instalment is not None


def test_memory_does_not_grow_with_the_list(tmp_path: Path, planners: Planners) -> None:
    """Peak memory of planning 20,000 and 200,000 rows, read and sorted in pieces that are small against both."""
    jobs = [
        job(tmp_path / f"{rows}", write_tsv(tmp_path / f"{rows}.tsv", 0, rows), small_pieces=True)
        for rows in (20_000, 200_000)
    ]
    (code, small), (other_code, large) = planners.run(jobs)
    assert (code, other_code) == (0, 0)
    assert large - small < 45, (small, large)  # some 10 MB of noise; held whole it is 135 MB more
