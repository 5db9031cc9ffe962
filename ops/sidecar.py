"""What ingestion finds out about the rows of a shard, and the files that it becomes: members of the tar, sidecar.

Not here: how a row comes by its picture (ops/ingest.py, ops/img2dataset_engine.py, ops/adopt.py), and how a shard is
committed (ops/shards.py).
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops.reasons import SUCCESS, Rejected
from ops.shards import sidecar_schema

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class Row:
    """What ingestion says of one row: the sidecar's columns of the same names, and where its new JPEG is spooled."""

    status: str = ""
    detail: str | None = None
    http_status: int | None = None
    final_url: str | None = None
    bytes_in: int | None = None
    content_type: str | None = None
    sha256: str | None = None
    dhash: str | None = None
    original_width: int | None = None
    original_height: int | None = None
    width: int | None = None
    height: int | None = None
    exif_orientation: int | None = None
    tar_offset: int | None = None
    jpg_size: int | None = None
    spooled_at: int | None = None

    def reject(self, rejected: Rejected) -> Row:
        """Takes the reason; returns itself."""
        self.status, self.detail = str(rejected.reason), rejected.detail or None
        self.http_status = rejected.http_status or self.http_status
        return self


COLUMNS = tuple(column.name for column in fields(Row) if column.name != "spooled_at")


class Spool:
    """JPEGs in the order of their arrival, on scratch: memory stays small, and the tar is assembled in key order."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._lock = threading.Lock()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, data: bytes) -> int:
        """Returns where it lies."""
        with self._lock:
            at = self._file.seek(0, 2)
            self._file.write(data)
            return at

    def read(self, at: int, size: int) -> bytes:
        with self._lock:
            self._file.seek(at)
            return self._file.read(size)


def members(
    table: pa.Table, rows: list[Row], spool: Spool, before: Callable[[str], Iterable[tuple[str, bytes]]]
) -> Iterator[tuple[str, bytes]]:
    """KEY.jpg KEY.json KEY.txt of every kept pair, in the order of keys (which is that of rows).

    `before` gives those of a key whose picture is not in the spool: the generation that a rerun grows out of.
    """
    for record, row in zip(table.to_pylist(), rows, strict=True):
        if row.status != SUCCESS:
            continue
        key = record["key"]
        if row.spooled_at is None:
            yield from before(key)
            continue
        assert row.jpg_size is not None
        yield f"{key}.jpg", spool.read(row.spooled_at, row.jpg_size)
        yield f"{key}.json", _describe(record, row)
        yield f"{key}.txt", (record["caption"] or "").encode()


def _describe(record: dict[str, Any], row: Row) -> bytes:
    """KEY.json: the row of the work order and what ingestion found out, but not where it lies in the tar."""
    found = {name: getattr(row, name) for name in COLUMNS if name not in ("detail", "tar_offset")}
    known_to_json = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in (record | found).items()
        if name != "detail"
    }
    return json.dumps(known_to_json, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str).encode()


def sidecar(table: pa.Table, rows: list[Row]) -> pa.Table:
    """One row per planned pair, in order, failures too: our columns, then the user's."""
    import pyarrow as pa

    schema = sidecar_schema()
    columns = {}
    for column in schema:
        if column.name in COLUMNS:
            columns[column.name] = pa.array([getattr(row, column.name) for row in rows], column.type)
        elif column.name in table.column_names:
            columns[column.name] = table[column.name].cast(column.type)
        else:
            columns[column.name] = pa.nulls(len(rows), column.type)
    for name in table.column_names:
        columns.setdefault(name, table[name])
    return pa.table(columns)
