"""Reading list files: Parquet, CSV, TSV, JSON, JSONL and txt, each also .gz, local or in a bucket, as raw rows.

Lives here: which files a name stands for, and how a row is read, with the line to blame when it can't be.
May not live here: what becomes of a row (ops/plan.py). Nothing here holds a whole list in memory.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.store import ObjectPath, StoreError, object_path, open_store
from ops.errors import BadList

BATCH_ROWS = 32_768
"""Rows that are read at a time: some 10 MB of URLs and captions."""

RESERVED = frozenset(
    (
        *("key", "uid", "url", "final_url", "caption", "status", "detail", "http_status", "bytes_in", "content_type"),
        *("sha256", "dhash", "original_width", "original_height", "width", "height", "exif_orientation", "language"),
        *("language_probability", "split", "weight", "tar_offset", "jpg_size", "crop", "k", "codes"),
        *("list_number", "list_line", "list_row"),
    )
)
"""Columns of our work orders, sidecars and code shards. One of the user's with such a name becomes `list_<name>`."""

FORMATS = ("parquet", "csv", "tsv", "json", "jsonl", "txt")


@dataclass(frozen=True)
class Columns:
    """Which columns of a list hold the URL and the caption."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    url: str = "url"
    """Column of URLs."""
    caption: str = "caption"
    """Column of captions."""


@dataclass(frozen=True)
class ListPath:
    """One list file: where it is, and `watched`: found in a folder, so a change of its bytes is no new list."""

    path: Path | ObjectPath
    watched: bool

    @property
    def label(self) -> str:
        """The absolute path or the URL: what instalments and errors call the file."""
        return _label(self.path)


@dataclass(frozen=True)
class Rows:
    """A batch of rows of one list. `splits` and `weights` are checked; None where the list has no such column.

    `lines` are what an error would name: the line that a row starts on, or its number in a Parquet file, from 1.
    """

    lines: Sequence[int]
    urls: list[bytes | None]
    captions: list[bytes | None]
    splits: list[str | None] | None
    weights: list[float] | None
    extra: pa.Table


def _label(path: Path | ObjectPath) -> str:
    if isinstance(path, ObjectPath):
        return str(path)
    return os.path.normpath(path.absolute())  # links are kept: the name that the user knows


def list_format(path: Path | ObjectPath) -> str | None:
    """The format a file's name says, or None.

    >>> list_format(Path("pairs.TSV.gz")), list_format(Path("README.md"))
    ('tsv', None)
    """
    name = path.name.lower().removesuffix(".gz")
    ending = {"ndjson": "jsonl"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
    return ending if ending in FORMATS else None


def find_lists(names: Sequence[str]) -> tuple[list[ListPath], list[str]]:
    """The list files that `names` (files or folders, local or s3://) stand for, sorted, and what was passed over.

    Folders are read recursively; in them, hidden files and `_…` (Spark's marks) are no lists, and other endings are
    passed over and returned.
    Raises BadList for a name that is not there, a file of an unknown ending, or a folder without a list.
    """
    found: dict[str, ListPath] = {}
    passed_over: list[str] = []
    known = ", ".join(f".{format}" for format in FORMATS)
    for name in names:
        file, inside = _in_bucket(name) if "://" in name else _on_disk(name)
        if file is None:
            lists = [path for path in inside if list_format(path) is not None]
            passed_over += [_label(path) for path in inside if list_format(path) is None]
            for path in lists:
                found.setdefault(_label(path), ListPath(path, watched=True))
            if not lists:
                raise BadList(name, None, f"the folder holds no list ({known}, each also .gz)")
        elif list_format(file) is None:
            raise BadList(name, None, f"a list's name ends in one of {known}, each also .gz")
        else:
            found[_label(file)] = ListPath(file, watched=False)
    return [found[label] for label in sorted(found)], sorted(passed_over)


_Paths = list[Path | ObjectPath]


def _on_disk(name: str) -> tuple[Path | None, _Paths]:
    """The file of this name, or None and the files in the folder of this name."""
    path = Path(name)
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.is_file())
        return None, [file for file in files if not _is_hidden(file.relative_to(path).parts)]
    if not path.exists():
        raise BadList(name, None, "no such file or folder")
    return path, []


def _in_bucket(name: str) -> tuple[ObjectPath | None, _Paths]:
    """As `_on_disk`, for an object or what lies below a prefix."""
    if not name.startswith("s3://"):
        raise BadList(name, None, "a list is a local file or folder, or lies at s3://bucket/…")
    file, below = object_path(name), open_store(name)
    if file.is_file():
        return file, []
    entries = list(below.list())
    if not entries:
        raise BadList(name, None, "no such file or folder in the bucket")
    return None, [ObjectPath(below, entry.key) for entry in entries if not _is_hidden(entry.key.split("/"))]


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part[:1] in ("", ".", "_") for part in parts)


Stamp = tuple[int, int, int, int]


def fingerprint(path: Path | ObjectPath) -> tuple[str, int, Stamp]:
    """Sha256 and size of a file, and a stamp that changes when somebody writes to it (compare with `stamp`)."""
    before = stamp(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest, before[0], before


def stamp(path: Path | ObjectPath) -> Stamp:
    """Size, times of the last write and of the last change of it or its name (ns), inode; in a bucket the first two."""
    if isinstance(path, ObjectPath):
        entry = path.entry()
        return entry.bytes, int(entry.modified_s * 1e9), 0, 0
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def read_rows(list_path: ListPath, columns: Columns, *, caption_required: bool, scratch: Path) -> Iterator[Rows]:
    """The rows of a list, in order, in batches. Raises BadList, with the line, at the first row that can't be read.

    `urls` and `captions` are the raw bytes (null is None); other columns keep their types (CSV and TSV: text).
    CSV is RFC 4180; TSV has no quoting; JSON is an array of objects; txt has one URL a line; empty lines are no rows.
    A list without captions is refused if they are required. `scratch` takes an unpacked .parquet.gz.
    """
    path, label, kind = list_path.path, list_path.label, list_format(list_path.path)
    names: dict[str, None] = {}
    needed = [(columns.url, "--url-col"), *([(columns.caption, "--caption-col")] if caption_required else [])]

    def check() -> None:
        for name, option in needed:
            if name not in names:
                there = ", ".join(names)[:500]
                what = f"has no column {name!r}, only: {there}. Name the right one with {option}"
                if kind == "txt":
                    what = "a .txt has URLs only, and captions are required (filters.caption_required)"
                raise BadList(label, 1 if kind in ("csv", "tsv") else None, what)

    try:
        for table, places in _read(path, label, columns, scratch):
            names.update(dict.fromkeys(table.column_names))
            if kind not in ("json", "jsonl"):  # objects may leave out a name: only all of them together can lack it
                check()
            yield _rows(table, places, columns, label)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, zlib.error, EOFError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, StoreError) or (isinstance(error, OSError) and error.errno is not None):
            raise  # the disk's or the bucket's; those of gzip and pyarrow about the content have no number
        raise BadList(label, None, f"can't be read as {path.name.lower()}: {_first_line(error)}") from error
    if not names:
        raise BadList(label, None, "has no rows")
    check()


@dataclass(frozen=True)
class _Places:
    """Where the rows of a batch stand: lines of a text, or row numbers (Parquet, JSON), both from 1."""

    numbers: Sequence[int]
    are_lines: bool = True

    def blame(self, label: str, row: int, what: str) -> NoReturn:
        number = self.numbers[row]
        if self.are_lines:
            raise BadList(label, number, what)
        raise BadList(label, None, f"row {number}: {what}")


_Batch = tuple[pa.Table, _Places]


def _read(path: Path | ObjectPath, label: str, columns: Columns, scratch: Path) -> Iterator[_Batch]:
    kind, packed = list_format(path), path.name.lower().endswith(".gz")
    if kind == "parquet":
        if packed:
            unpacked = scratch / "unpacked.parquet"
            with path.open("rb") as file, gzip.open(file, "rb") as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            path = unpacked
        yield from _read_parquet(path, label)
        return
    with path.open("rb") as file, gzip.open(file, "rb") if packed else nullcontext(file) as unpacking:
        stream: IO[bytes] = unpacking  # type: ignore[assignment]  # GzipFile is one in all but name
        _check_encoding(stream, label)
        if kind == "csv":
            yield from _read_csv(stream, label, columns)
        elif kind == "tsv":
            yield from _read_tsv(stream, label, columns)
        elif kind == "txt":
            yield from _read_txt(stream, columns)
        elif kind == "jsonl":
            yield from _objects(_read_jsonl(stream, label), columns, label)
        else:
            yield from _objects(_read_json(stream, label), columns, label)


def _read_parquet(path: Path | ObjectPath, label: str) -> Iterator[_Batch]:
    # A buffered stream: without it a whole column chunk is read at once, and some lists are one row group.
    opened = nullcontext(path) if isinstance(path, Path) else path.open("rb", buffering=1)
    with opened as source, pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as file:
        names = file.schema_arrow.names
        _check_unique(names, label, None)
        row = 1
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            if not len(batch):
                continue
            yield pa.Table.from_batches([batch]), _Places(range(row, row + len(batch)), are_lines=False)
            row += len(batch)


def _read_csv(stream: IO[bytes], label: str, columns: Columns) -> Iterator[_Batch]:
    # surrogateescape keeps bytes that are not UTF-8: they are a pair's problem, not the list's.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    names: list[str] | None = None
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1  # a quoted field may hold line ends: the error names the line its row starts on
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise BadList(label, start, f"is not CSV (RFC 4180): {error}") from error
        if row is None:
            break
        line, start = start, reader.line_num + 1
        if not row:
            continue  # an empty line
        if names is None:
            names = _header([name.encode("utf-8", "surrogateescape") for name in row], label)
            continue
        if len(row) != len(names):
            raise BadList(label, line, f"has {len(row)} fields, the header has {len(names)}")
        rows.append(row)
        lines.append(line)
        if len(rows) == BATCH_ROWS:
            yield _csv_table(names, rows, columns), _Places(lines)
            rows, lines = [], []
    text.detach()
    if rows and names is not None:
        yield _csv_table(names, rows, columns), _Places(lines)


def _csv_table(names: list[str], rows: list[list[str]], columns: Columns) -> pa.Table:
    fields = ([field.encode("utf-8", "surrogateescape") for field in column] for column in zip(*rows, strict=True))
    return _text_table(names, fields, columns)


def _read_tsv(stream: IO[bytes], label: str, columns: Columns) -> Iterator[_Batch]:
    header = stream.readline(1 << 20)
    if not header.strip():
        return
    names = _header(header.rstrip(b"\r\n").split(b"\t"), label)
    rows: list[list[bytes]] = []
    lines: list[int] = []
    for line, data in enumerate(stream, 2):
        data = data.rstrip(b"\n").removesuffix(b"\r")
        if not data:
            continue  # an empty line
        row = data.split(b"\t")
        if len(row) != len(names):
            raise BadList(label, line, f"has {len(row)} fields, the header has {len(names)}")
        rows.append(row)
        lines.append(line)
        if len(rows) == BATCH_ROWS:
            yield _text_table(names, zip(*rows, strict=True), columns), _Places(lines)
            rows, lines = [], []
    if rows:
        yield _text_table(names, zip(*rows, strict=True), columns), _Places(lines)


def _read_txt(stream: IO[bytes], columns: Columns) -> Iterator[_Batch]:
    urls: list[bytes] = []
    lines: list[int] = []
    for line, data in enumerate(stream, 1):
        url = data.strip()
        if not url:
            continue
        urls.append(url)
        lines.append(line)
        if len(urls) == BATCH_ROWS:
            yield _txt_table(urls, columns), _Places(lines)
            urls, lines = [], []
    if urls:
        yield _txt_table(urls, columns), _Places(lines)


def _txt_table(urls: list[bytes], columns: Columns) -> pa.Table:
    return pa.table({columns.url: pa.array(urls, pa.binary())})


_Object = tuple[int, dict[str, Any]]


def _read_jsonl(stream: IO[bytes], label: str) -> Iterator[_Object]:
    for line, data in enumerate(stream, 1):
        text = data.decode("utf-8", "surrogateescape").strip()
        if not text:
            continue
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except ValueError as error:
            raise BadList(label, line, f"is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BadList(label, line, "is no JSON object; JSONL has one object a line")
        yield line, value


def _read_json(stream: IO[bytes], label: str) -> Iterator[_Object]:
    """The objects of one JSON array, parsed as they come: pandas and json.load would hold the whole file."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    text, at, line, last = "", 0, 1, False
    expect = "["

    def more() -> bool:
        nonlocal text, at, last
        data = stream.read(1 << 20)
        # Cut at a byte that no UTF-8 sequence continues, so that a character is never split.
        while data and data[-1] >= 0x80:
            byte = stream.read(1)
            if not byte:
                break
            data += byte
        last = not data
        text, at = text[at:] + data.decode("utf-8", "surrogateescape"), 0
        return not last

    while True:
        while at < len(text) and text[at] in " \t\r\n":
            line += text[at] == "\n"
            at += 1
        if at == len(text):
            if more():
                continue
            if expect == "":
                return
            raise BadList(label, line, "is not JSON: the file ends before its array does")
        char = text[at]
        if expect == "[":
            if char != "[":
                raise BadList(label, line, "is no JSON array of objects; one object a line is JSONL (.jsonl)")
            expect, at = "value or ]", at + 1
        elif expect == "":
            raise BadList(label, line, "is not JSON: something follows the array")
        elif char == "]" and expect != "value":
            expect, at = "", at + 1
        elif expect == ", or ]":
            if char != ",":
                raise BadList(label, line, "is not JSON: a comma or ] is missing")
            expect, at = "value", at + 1
        else:
            try:
                value, end = decoder.raw_decode(text, at)
            except ValueError as error:
                if len(text) - at < 16 << 20 and more():
                    continue
                raise BadList(label, line, f"is not JSON: {error}") from error
            if not isinstance(value, dict):
                raise BadList(label, line, "is no object; a JSON list is an array of objects")
            yield line, value
            line += text.count("\n", at, end)
            expect, at = ", or ]", end


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _objects(objects: Iterator[_Object], columns: Columns, label: str) -> Iterator[_Batch]:
    values: list[dict[str, Any]] = []
    lines: list[int] = []
    for line, value in objects:
        values.append(value)
        lines.append(line)
        if len(values) == BATCH_ROWS:
            yield _object_table(values, _Places(lines), columns, label), _Places(lines)
            values, lines = [], []
    if values:
        yield _object_table(values, _Places(lines), columns, label), _Places(lines)


def _object_table(values: list[dict[str, Any]], places: _Places, columns: Columns, label: str) -> pa.Table:
    names = list(dict.fromkeys(name for value in values for name in value))
    arrays: dict[str, pa.Array] = {}
    for name in names:
        column = [value.get(name) for value in values]
        if name in (columns.url, columns.caption):
            for row, item in enumerate(column):
                if item is not None and not isinstance(item, str):
                    places.blame(label, row, f"{name} must be a text, found {json.dumps(item)[:80]}")
            arrays[name] = pa.array([None if item is None else _json_bytes(item) for item in column], pa.binary())
            continue
        try:
            arrays[name] = pa.array(column)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            low, high = 0, len(column)  # the shortest beginning that fails ends at the row to blame
            while high - low > 1:
                middle = (low + high) // 2
                try:
                    pa.array(column[:middle])
                    low = middle
                except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
                    high = middle
            places.blame(label, high - 1, f"column {name!r} does not go with the rows before: {_first_line(error)}")
    return pa.table(arrays)


def _json_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone \ud800 written as an escape: kept as bytes that are not UTF-8
        return text.encode("utf-8", "surrogatepass")


def _check_encoding(stream: IO[bytes], label: str) -> None:
    """Skips a UTF-8 mark; refuses UTF-16 and UTF-32, which would read as one broken line."""
    start = stream.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise BadList(label, 1, "is UTF-16 or UTF-32, not UTF-8; convert it, e.g. with `iconv -f UTF-16 -t UTF-8`")
    stream.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)


def _header(fields: list[bytes], label: str) -> list[str]:
    try:
        names = [field.decode() for field in fields]
    except UnicodeDecodeError as error:
        raise BadList(label, 1, "the names of the columns are not UTF-8") from error
    _check_unique(names, label, 1)
    return names


def _check_unique(names: Sequence[str], label: str, line: int | None) -> None:
    for name in names:
        if names.count(name) > 1:
            raise BadList(label, line, f"has two columns named {name!r}")


def _text_table(names: Sequence[str], columns_of_bytes: Iterator[Sequence[bytes]], columns: Columns) -> pa.Table:
    arrays = {}
    for name, fields in zip(names, columns_of_bytes, strict=True):
        array = pa.array(fields, pa.binary())
        arrays[name] = array if name in (columns.url, columns.caption) else text(array)[0]
    return pa.table(arrays)


def text(array: pa.Array) -> tuple[pa.Array, frozenset[int]]:
    """Bytes as text, and the rows that are not UTF-8: these are written out with backslashes, nothing is lost.

    >>> text(pa.array([b"caf\\xe9", None, b"tea"], pa.binary()))[1]
    frozenset({0})
    """
    try:
        return array.cast(pa.string()), frozenset()
    except pa.ArrowInvalid:
        texts: list[str | None] = []
        broken = set()
        for row, value in enumerate(array.to_pylist()):
            try:
                texts.append(None if value is None else value.decode())
            except UnicodeDecodeError:
                texts.append(value.decode("utf-8", "backslashreplace"))
                broken.add(row)
        return pa.array(texts, pa.string()), frozenset(broken)


def _rows(table: pa.Table, places: _Places, columns: Columns, label: str) -> Rows:
    names = set(table.column_names)
    return Rows(
        lines=places.numbers,
        urls=_raw(table, columns.url, label),
        captions=_raw(table, columns.caption, label),
        splits=_splits(table["split"], places, label) if "split" in names else None,
        weights=_weights(table["weight"], places, label) if "weight" in names else None,
        extra=_extra(table, columns, label),
    )


def _raw(table: pa.Table, name: str, label: str) -> list[bytes | None]:
    if name not in table.column_names:
        return [None] * len(table)
    column = _plain(table[name])
    if pa.types.is_null(column.type):
        return [None] * len(table)
    if not _is_text(column.type):
        raise BadList(label, None, f"column {name!r} holds {column.type}, text is needed")
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def _is_text(type: pa.DataType) -> bool:
    of = pa.types
    return bool(of.is_string(type) or of.is_large_string(type) or of.is_binary(type) or of.is_large_binary(type))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionaries differ from row group to row group: only plain columns can be put together."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _splits(column: pa.ChunkedArray, places: _Places, label: str) -> list[str | None]:
    values = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in column.to_pylist()]
    values = [None if value == "" else value for value in values]
    for row, value in enumerate(values):
        if value not in ("train", "held_out", None):
            places.blame(label, row, f"split must be 'train' or 'held_out' (or empty), found {str(value)[:80]!r}")
    return values


def _weights(column: pa.ChunkedArray, places: _Places, label: str) -> list[float]:
    values = _plain(column).to_pylist()
    weights = np.ones(len(values))
    for row, value in enumerate(values):
        if value is None or value == "":
            continue
        try:
            weights[row] = float(value)
        except (TypeError, ValueError):
            places.blame(label, row, f"weight must be a number in (0, 1], found {str(value)[:80]!r}")
    bad = np.flatnonzero(~((weights > 0) & (weights <= 1)))
    if len(bad):
        row = int(bad[0])
        places.blame(label, row, f"weight must be in (0, 1], found {weights[row]:g}")
    return [float(weight) for weight in weights]


def _extra(table: pa.Table, columns: Columns, label: str) -> pa.Table:
    kept: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        if name in (columns.url, columns.caption, "split", "weight"):
            continue
        new = f"list_{name}" if name in RESERVED else name
        if new in kept or (new != name and new in table.column_names):
            raise BadList(label, None, f"column {name!r} would be stored as {new!r}, and there is one; rename it")
        kept[new] = _plain(table[name])
    if not kept:
        return pa.table({"": pa.nulls(len(table))}).drop_columns([""])
    return pa.table(kept)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
