"""Lists: every format gives the same rows, and what can't be read is named with its line, never skipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.store import StoreError, open_store
from ops import lists
from ops.errors import BadList
from ops.lists import RESERVED, Columns, ListPath, Rows, find_lists, fingerprint, read_rows, stamp

BY_NAME = Columns()
PAIRS = [
    ("http://a.example/1.jpg", "a cat, on a mat", "x"),
    ("http://b.example/2.jpg", 'she said "hello"', "y"),
    ("http://c.example/3.jpg", "ein Käse für 山田 🧀", ""),
]


def write_parquet(path: Path, pairs: list[tuple[str, str, str]]) -> None:
    url, caption, subset = zip(*pairs, strict=True)
    table = pa.table({"url": url, "caption": caption, "subset": subset})
    pq.write_table(table, path, row_group_size=2)


def write_csv(path: Path, pairs: list[tuple[str, str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "caption", "subset"), *pairs])


def write_tsv(path: Path, pairs: list[tuple[str, str, str]]) -> None:
    rows = [("url", "caption", "subset"), *pairs]
    path.write_bytes("".join("\t".join(row) + "\n" for row in rows).encode())


def as_objects(pairs: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    return [{"url": url, "caption": caption, "subset": subset} for url, caption, subset in pairs]


def write_jsonl(path: Path, pairs: list[tuple[str, str, str]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in as_objects(pairs)), encoding="utf-8")


def write_json(path: Path, pairs: list[tuple[str, str, str]]) -> None:
    path.write_text(json.dumps(as_objects(pairs), indent=2, ensure_ascii=False), encoding="utf-8")


WRITERS: dict[str, Callable[[Path, list[tuple[str, str, str]]], None]] = {
    "parquet": write_parquet,
    "csv": write_csv,
    "tsv": write_tsv,
    "jsonl": write_jsonl,
    "json": write_json,
}


def read(path: Path, columns: Columns = BY_NAME, *, caption_required: bool = True) -> Rows:
    """The whole list as one batch."""
    batches = list(
        read_rows(ListPath(path, watched=False), columns, caption_required=caption_required, scratch=path.parent)
    )
    return Rows(
        lines=[line for batch in batches for line in batch.lines],
        urls=[url for batch in batches for url in batch.urls],
        captions=[caption for batch in batches for caption in batch.captions],
        splits=None if batches[0].splits is None else [s for batch in batches for s in batch.splits or []],
        weights=None if batches[0].weights is None else [w for batch in batches for w in batch.weights or []],
        extra=pa.concat_tables([batch.extra for batch in batches], promote_options="permissive"),
    )


def bad(path: Path, data: bytes, columns: Columns = BY_NAME) -> BadList:
    path.write_bytes(data)
    with pytest.raises(BadList) as raised:
        read(path, columns)
    return raised.value


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("format", sorted(WRITERS))
def test_every_format_packed_or_not_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, packed: bool
) -> None:
    path = tmp_path / f"list.{format}"
    WRITERS[format](path, PAIRS)
    if packed:
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress((tmp_path / f"list.{format}").read_bytes()))
    for batch_rows in (1, 2, 3, 100):
        monkeypatch.setattr(lists, "BATCH_ROWS", batch_rows)
        rows = read(path)
        assert rows.urls == [url.encode() for url, _, _ in PAIRS]
        assert rows.captions == [caption.encode() for _, caption, _ in PAIRS]
        assert rows.extra.to_pydict() == {"subset": ["x", "y", ""]}
        assert rows.splits is None
        assert rows.weights is None


def test_txt_is_a_url_a_line_and_refused_where_captions_are_required(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"http://a/1,2.jpg\r\n\n  http://b/2.jpg  \n")
    rows = read(path, caption_required=False)
    assert rows.urls == [b"http://a/1,2.jpg", b"http://b/2.jpg"]
    assert rows.captions == [None, None]
    with pytest.raises(BadList, match=r"captions are required \(filters.caption_required\)"):
        read(path)


FIELD = st.text(st.characters(exclude_characters="\t\n\r\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=6))
def test_any_text_comes_back_from_any_format(tmp_path: Path, pairs: list[tuple[str, str, str]]) -> None:
    for format, write in WRITERS.items():
        path = tmp_path / f"list.{format}"
        write(path, pairs)
        rows = read(path)
        got = zip(rows.urls, rows.captions, rows.extra["subset"].to_pylist(), strict=True)
        assert [(url, caption, subset) for url, caption, subset in got] == [
            (url.encode(), caption.encode(), subset) for url, caption, subset in pairs
        ], format


def test_csv_fields_may_hold_commas_quotes_and_line_ends_and_tsv_quotes_mean_nothing(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(b'url,caption\r\n"http://a/1,2","two\r\nlines ""quoted"""\r\n\r\nhttp://b,\r\n')
    assert read(path).captions == [b'two\r\nlines "quoted"', b""]
    path = tmp_path / "list.tsv"
    path.write_bytes(b'url\tcaption\r\nhttp://a\t"a cat, "so\r\n\nhttp://b\t\'')
    assert read(path).captions == [b'"a cat, "so', b"'"]


@pytest.mark.parametrize(
    ("name", "data", "line", "what"),
    [
        ("a.csv", b'url,caption\nhttp://a,"two\nlines"\nhttp://b,x,y\n', 4, "has 3 fields, the header has 2"),
        ("a.csv", b'url,caption\nhttp://a,x\nhttp://b,"open\nand on\n', 3, "is not CSV"),
        ("a.csv", b'url,caption\nhttp://a,"x"y\n', 2, "is not CSV"),
        ("a.csv", b"url,caption,url\nhttp://a,x,y\n", 1, "two columns named 'url'"),
        ("a.tsv", b"url\tcaption\nhttp://a\tx\n\nhttp://b\n", 4, "has 1 fields, the header has 2"),
        ("a.tsv", b"url\tcaption\tx\tx\nhttp://a\tx\t\t\n", 1, "two columns named 'x'"),
        ("a.tsv", b"url\tcapt\xe9on\nhttp://a\tx\n", 1, "not UTF-8"),
        ("a.tsv", "url\tcaption\nhttp://a\tx\n".encode("utf-16"), 1, "UTF-16"),
        ("a.csv", "url,caption\nhttp://a,x\n".encode("utf-16-le"), 1, "UTF-16"),
        ("a.jsonl", '{"url": "http://a"}'.encode("utf-16-be"), 1, "UTF-16"),
        ("a.jsonl", b'{"url": "http://a", "caption": "x"}\n\n{"url": \n', 3, "is not JSON"),
        ("a.jsonl", b'{"url": "http://a", "caption": "x"}\n["http://b"]\n', 2, "no JSON object"),
        ("a.jsonl", b'{"url": "u", "caption": "x"}\n{"url": 7, "caption": "x"}\n', 2, "url must be a text, found 7"),
        ("a.jsonl", b'{"url": "u", "caption": "x", "n": 1}\n{"url": "u", "caption": "x", "n": "1"}\n', 2, "column 'n'"),
        ("a.jsonl", b'{"url": "u", "caption": "x", "n": NaN}\n', 1, "NaN is no JSON"),
        ("a.json", b'[{"url": "u", "caption": "x"},\n {"url": "v"\n "caption": "x"}]', 2, "is not JSON"),
        ("a.json", b'[{"url": "u", "caption": "x"}\n {"url": "v"}]', 2, "a comma or ]"),
        ("a.json", b'[{"url": "u", "caption": "x"},\n\n]', 3, "is not JSON"),
        ("a.json", b'[{"url": "u", "caption": "x"}\n', 2, "the file ends"),
        ("a.json", b'[{"url": "u", "caption": "x"}]\n{}', 2, "something follows"),
        ("a.json", b'{"url": ["u"], "caption": ["x"]}', 1, "no JSON array of objects"),
        ("a.json", b'[\n"http://a"]', 2, "is no object"),
        ("a.tsv", b"url\tcaption\tsplit\nu\tx\ttrain\nu\tx\ttest\n", 3, "'train' or 'held_out'"),
        ("a.tsv", b"url\tcaption\tweight\nu\tx\t0.5\nu\tx\t1.5\n", 3, r"weight must be in \(0, 1\], found 1.5"),
        ("a.tsv", b"url\tcaption\tweight\nu\tx\t\nu\tx\tnan\n", 3, r"weight must be in \(0, 1\], found nan"),
        ("a.csv", b"url,caption,weight\nu,x,0\n", 2, r"weight must be in \(0, 1\], found 0"),
        ("a.csv", b"url,caption,weight\nu,x,heavy\n", 2, "weight must be a number"),
    ],
)
def test_a_row_that_can_not_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, data: bytes, line: int, what: str
) -> None:
    for packed in (False, True):
        path = tmp_path / (name + ".gz" * packed)
        error = bad(path, gzip.compress(data) if packed else data)
        assert error.args[:2] == (str(path), line)
        with pytest.raises(BadList, match=what):
            raise error


@pytest.mark.parametrize("format", sorted(WRITERS))
def test_a_missing_column_is_named_with_those_that_exist_and_the_option(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"laion.{format}"
    WRITERS[format](path, PAIRS)
    with pytest.raises(BadList, match=r"no column 'URL', only: url, caption, subset.*--url-col"):
        read(path, Columns(url="URL"))
    with pytest.raises(BadList, match=r"no column 'TEXT', only: url, caption, subset.*--caption-col"):
        read(path, Columns(caption="TEXT"))
    assert read(path, Columns(caption="TEXT"), caption_required=False).captions == [None] * 3


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl", "b.jsonl.gz"])
@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf"])
def test_an_empty_list_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(BadList, match="has no rows"):
        raise bad(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)


def test_a_list_of_a_header_only_is_refused(tmp_path: Path) -> None:
    for name, data in [("a.csv", b"url,caption\n"), ("a.tsv", b"url\tcaption\n"), ("a.json", b"[ ]")]:
        with pytest.raises(BadList, match="has no rows"):
            raise bad(tmp_path / name, data)
    pq.write_table(pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}), tmp_path / "a")
    with pytest.raises(BadList, match="has no rows"):
        raise bad(tmp_path / "a.parquet", (tmp_path / "a").read_bytes())


@pytest.mark.parametrize("cut", [0, 3, 100, -5, -9])
def test_a_torn_parquet_or_gzip_file_is_a_bad_list(tmp_path: Path, cut: int) -> None:
    write_parquet(tmp_path / "whole.parquet", PAIRS * 50)
    data = (tmp_path / "whole.parquet").read_bytes()
    bad(tmp_path / "torn.parquet", data[:cut])
    bad(tmp_path / "torn.parquet.gz", gzip.compress(data)[:cut])
    bad(tmp_path / "torn.tsv.gz", gzip.compress(b"".join(b"url\t%d\n" % (n * n) for n in range(500)))[:cut])


def test_flipped_bytes_inside_a_parquet_file_are_a_bad_list_or_other_values(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": [f"http://a/{n}" for n in range(500)], "caption": ["some words"] * 500}), tmp_path / "w"
    )
    whole = bytearray((tmp_path / "w").read_bytes())
    path = tmp_path / "flipped.parquet"
    refused = 0
    for place in range(4, len(whole), 97):
        flipped = whole.copy()
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        try:
            read(path)
        except BadList:
            refused += 1
    assert refused


def test_bytes_that_are_not_utf8_stay_as_they_are(tmp_path: Path) -> None:
    caption, odd = b"caf\xe9", b"\xff\xfe"
    (tmp_path / "a.csv").write_bytes(b"url,caption,x\nhttp://a,%b,%b\n" % (caption, odd))
    (tmp_path / "a.tsv").write_bytes(b"url\tcaption\tx\nhttp://a\t%b\t%b\n" % (caption, odd))
    (tmp_path / "a.jsonl").write_bytes(b'{"url": "http://a", "caption": "%b", "x": "y"}\n' % caption)
    (tmp_path / "a.json").write_bytes(b'[{"url": "http://a", "caption": "%b", "x": "y"}]' % caption)
    table = pa.table({"url": ["http://a"], "caption": pa.array([caption], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    broken = pa.StringArray.from_buffers(1, pa.array([caption]).buffers()[1], pa.py_buffer(caption))
    pq.write_table(pa.table({"url": ["http://a"], "caption": broken}), tmp_path / "b.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read(path).captions == [caption], path
    assert read(tmp_path / "a.tsv").extra["x"].to_pylist() == [r"\xff\xfe"]


def test_a_lone_surrogate_in_json_becomes_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"url": "http://a", "caption": "\\ud800"}\n{"url": "http://b", "caption": "\\ud83e\\uddc0"}\n')
    first, second = read(path).captions
    assert second == "🧀".encode()
    with pytest.raises(UnicodeDecodeError):
        (first or b"").decode()


def test_null_is_told_from_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"url": "u", "caption": null}\n{"url": "v"}\n{"url": "w", "caption": ""}\n')
    assert read(path).captions == [None, None, b""]
    pq.write_table(pa.table({"url": ["u", "v"], "caption": pa.array([None, ""])}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").captions == [None, b""]


def test_columns_of_the_user_keep_their_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "BATCH_ROWS", 2)
    extra: dict[str, Any] = {
        "n": pa.array([1, None, 3], pa.int16()),
        "score": pa.array([0.5, 1.5, None]),
        "tags": pa.array([["a"], [], None], pa.list_(pa.string())),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
    }
    pq.write_table(pa.table({"url": list("uvw"), "caption": list("abc"), **extra}), tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet").extra
    assert table.schema.field("n").type == pa.int16()
    assert table.schema.field("kind").type == pa.string()
    assert table.to_pydict() == {name: column.to_pylist() for name, column in extra.items()}
    path = tmp_path / "a.jsonl"
    path.write_text('{"url": "u", "caption": "a", "n": 1}\n{"url": "v", "caption": "b", "deep": {"x": [true]}}\n')
    assert read(path).extra.to_pydict() == {"n": [1, None], "deep": [None, {"x": [True]}]}


def test_a_column_with_a_name_of_ours_is_carried_under_another(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("URL\tTEXT\turl\tsha256\tWIDTH\twidth\nu\tx\told\tab\t1\t2\n")
    columns = Columns(url="URL", caption="TEXT")
    assert read(path, columns).extra.to_pylist() == [
        {"list_url": "old", "list_sha256": "ab", "WIDTH": "1", "list_width": "2"}
    ]
    path.write_text("url\tcaption\tkey\tlist_key\nu\tx\t1\t2\n")
    with pytest.raises(BadList, match="'key' would be stored as 'list_key'"):
        read(path)
    assert not {f"list_{name}" for name in RESERVED} & RESERVED


def test_split_and_weight_are_read_from_any_type(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,caption,split,weight\nu,x,train,0.5\nu,x,,\nu,x,held_out,1\n")
    table = {"split": pa.array(["train", None, "held_out"]).dictionary_encode(), "weight": [0.5, None, 1.0]}
    pq.write_table(pa.table({"url": ["u"] * 3, "caption": ["x"] * 3, **table}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(
        '{"url":"u","caption":"x","split":"train","weight":0.5}\n{"url":"u","caption":"x"}\n'
        '{"url":"u","caption":"x","split":"held_out","weight":1}\n'
    )
    for path in sorted(tmp_path.iterdir()):
        rows = read(path)
        assert rows.splits == ["train", None, "held_out"], path
        assert rows.weights == [0.5, 1.0, 1.0], path


def test_a_wrong_value_in_parquet_is_named_with_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "BATCH_ROWS", 2)
    table = pa.table({"url": ["u"] * 5, "caption": ["x"] * 5, "weight": [1.0, 1.0, 1.0, -0.5, 1.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadList, match=r"row 4: weight must be in \(0, 1\], found -0.5"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"url": [1, 2], "caption": ["x", "y"]}), tmp_path / "b.parquet")
    with pytest.raises(BadList, match="'url' holds int64, text is needed"):
        read(tmp_path / "b.parquet")


def test_json_is_read_in_pieces(tmp_path: Path) -> None:
    """Objects and characters that lie across the pieces of a megabyte."""
    objects = [{"url": f"http://a/{n}", "caption": "🧀é" * (n % 50)} for n in range(30_000)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(objects, ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size > 4 << 20
    rows = read(path)
    assert rows.urls == [str(item["url"]).encode() for item in objects]
    assert rows.captions == [str(item["caption"]).encode() for item in objects]


def test_a_folder_is_read_recursively_sorted_and_names_what_it_passes_over(tmp_path: Path) -> None:
    for name in ("b/2.tsv", "b/1.CSV.gz", "a.jsonl", "z.ndjson", ".hidden.tsv", "b/_SUCCESS", "_tmp/x.tsv", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    found, passed_over = find_lists([str(tmp_path), str(tmp_path / "b")])
    assert [item.label for item in found] == [
        str(tmp_path / n) for n in ("a.jsonl", "b/1.CSV.gz", "b/2.tsv", "z.ndjson")
    ]
    assert all(item.watched for item in found)
    assert passed_over == [str(tmp_path / "notes.md")]
    [named], _ = find_lists([str(tmp_path / "a.jsonl")])
    assert not named.watched


def test_a_name_that_stands_for_no_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    for name, what in [
        (str(tmp_path / "none.tsv"), "no such file"),
        (str(tmp_path / "notes.md"), "name ends in one of"),
        (str(tmp_path), "holds no list"),
        ("gopher://bucket/list.tsv", "a local file or folder, or lies at s3://"),
    ]:
        with pytest.raises(BadList, match=what):
            find_lists([name])


def test_lists_in_a_bucket_are_found_and_read_like_local_ones(bucket: str, tmp_path: Path) -> None:
    table = pa.table({"url": [f"http://a/{n}" for n in range(1000)], "caption": ["é" * (n % 9) for n in range(1000)]})
    files = {
        "b/2.tsv": "url\tcaption\nu\té\n".encode(),
        "b/1.CSV.gz": gzip.compress(b'url,caption\r\nu,"a\nb"\r\n'),
        "a.jsonl": b'{"url": "u", "caption": "c"}\n',
        "c.json": b'[{"url": "u", "caption": "c"}]',
        "d.txt.gz": gzip.compress(b"u\n\nv\n"),
    }
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=300)
    files["e.parquet"] = (tmp_path / "e.parquet").read_bytes()
    files["f.parquet.gz"] = gzip.compress(files["e.parquet"])
    others = dict.fromkeys((".hidden.tsv", "b/_SUCCESS", "_tmp/x.tsv", "notes.md"), b"")
    store = open_store(bucket)
    for name, data in {**files, **others}.items():
        store.put(f"lists/{name}", data)
        path = tmp_path / "lists" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    there, passed_over = find_lists([f"{bucket}/lists/"])
    here, passed_over_here = find_lists([str(tmp_path / "lists")])
    assert [item.label for item in there] == [f"{bucket}/lists/{name}" for name in sorted(files)]
    assert passed_over == [f"{bucket}/lists/notes.md"]
    assert [name.replace(str(tmp_path), bucket) for name in passed_over_here] == passed_over
    assert all(item.watched for item in there)
    for one, other in zip(there, here, strict=True):
        assert fingerprint(one.path)[:2] == fingerprint(other.path)[:2]
        assert stamp(one.path) == fingerprint(one.path)[2]
        read_there, read_here = (
            [*read_rows(path, Columns(), caption_required=False, scratch=tmp_path)] for path in (one, other)
        )
        assert read_there == read_here, one.label
    [named], _ = find_lists([f"{bucket}/lists/b/2.tsv"])
    assert not named.watched
    assert named.label == f"{bucket}/lists/b/2.tsv"


def test_a_name_in_a_bucket_that_stands_for_no_list_is_refused(bucket: str) -> None:
    store = open_store(bucket)
    store.put("lists/notes.md", b"x")
    for name, what in [
        (f"{bucket}/none.tsv", "no such file or folder in the bucket"),
        (f"{bucket}/list", "no such file or folder in the bucket"),
        (f"{bucket}/lists/notes.md", "name ends in one of"),
        (f"{bucket}/lists", "holds no list"),
    ]:
        with pytest.raises(BadList, match=what) as told:
            find_lists([name])
        assert name in str(told.value)
    store.put("lists/cut.csv.gz", gzip.compress(b"url,caption\r\n" * 100)[:-9])
    [cut], _ = find_lists([f"{bucket}/lists/cut.csv.gz"])
    with pytest.raises(BadList, match=r"cut\.csv\.gz: can't be read as cut"):
        [*read_rows(cut, Columns(), caption_required=True, scratch=Path("/tmp"))]


def test_a_list_whose_bucket_goes_away_is_no_bad_list(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(bucket)
    store.put("a.tsv", b"url\tcaption\nu\tc\n")
    [path], _ = find_lists([f"{bucket}/a.tsv"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="not accepted"):
        [*read_rows(path, Columns(), caption_required=True, scratch=Path("/tmp"))]


def test_a_line_that_never_ends_is_no_header(tmp_path: Path) -> None:
    with pytest.raises(BadList):
        raise bad(tmp_path / "a.tsv", b"x" * (3 << 20))


def test_csv_of_another_program_is_read_like_ours(tmp_path: Path) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
        [("url", "caption"), ("u", "a\nb"), ("v", "")]
    )
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    rows = read(tmp_path / "a.csv")
    assert (rows.urls, rows.captions) == ([b"u", b"v"], [b"a\nb", b""])
