"""Sorting the rows of a plan by uid, outside memory: sorted runs on scratch, merged a range of uids at a time.

May not live here: what a row means (ops/plan.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ops.errors import BadList

RUN_ROWS = 1 << 19
RUN_BYTES = 96 << 20
"""A sorted run on scratch is written when it has that many rows, or bytes (columns of embeddings). The fewer runs, the
fewer pieces: there are runs times buckets of them, and each costs some 50 us."""
BUCKET_BYTES = 16 << 20
"""Bytes of the lists (packed ones counted six-fold) for one bucket; a bucket of all runs is in memory at a time."""

U64s = np.ndarray[Any, np.dtype[np.uint64]]


class UidSort:
    """Takes tables with a column `uid` (16 bytes) in any order, and gives their rows back by uid."""

    def __init__(self, scratch: Path, list_bytes: int) -> None:
        self._file = (scratch / "runs.arrow").open("w+b")
        self._buckets = min(1024, 1 + list_bytes // BUCKET_BYTES)
        self._schema = pa.schema([])
        self._waiting: list[pa.Table] = []
        self._runs: list[tuple[pa.Schema, list[int]]] = []
        """Of each run its schema, and where in the file each bucket begins and the last one ends."""

    def __enter__(self) -> UidSort:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, table: pa.Table, label: str) -> None:
        """Takes rows in list order. Raises BadList if a column's type conflicts with the rows before."""
        for column in table.schema:
            known = self._schema.field(column.name) if column.name in self._schema.names else None
            try:
                pa.unify_schemas([pa.schema([f]) for f in (known, column) if f], promote_options="permissive")
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                assert known is not None
                what = f"column {column.name!r} holds {column.type} here and {known.type} in the rows or lists before"
                raise BadList(label, None, what) from None
        self._schema = pa.unify_schemas([self._schema, table.schema], promote_options="permissive")
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= RUN_ROWS or sum(table.nbytes for table in self._waiting) >= RUN_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = self._by_uid(self._waiting)
        self._waiting = []
        edges = [(bucket << 64) // self._buckets for bucket in range(1, self._buckets)]
        cuts = [0, *np.searchsorted(uid_halves(table)[:, 0], np.array(edges, np.uint64)).tolist(), len(table)]
        places = [self._file.tell()]
        for start, stop in pairwise(cuts):
            for batch in table.slice(start, stop - start).to_batches():
                self._file.write(batch.serialize())
            places.append(self._file.tell())
        self._runs.append((table.schema, places))

    def sorted(self) -> Iterator[pa.Table]:
        """All rows in the order of their uids (equal ones in the order they came), a bucket at a time."""
        self._flush()
        for bucket in range(self._buckets):
            parts = []
            for schema, places in self._runs:
                start, stop = places[bucket : bucket + 2]
                self._file.seek(start)
                source = pa.BufferReader(self._file.read(stop - start))
                while source.tell() < stop - start:
                    batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
                    parts.append(pa.Table.from_batches([batch]))
            if parts:
                yield self._by_uid(parts)

    def _by_uid(self, tables: list[pa.Table]) -> pa.Table:
        """One table in one piece, with the columns of all."""
        tables = [pa.table([_cast(table, f) for f in self._schema], self._schema) for table in tables]
        table = pa.concat_tables(tables).combine_chunks()
        halves = uid_halves(table)
        return table.take(pa.array(np.lexsort((halves[:, 1], halves[:, 0]))))  # stable: equal uids keep their order


def _cast(table: pa.Table, to: pa.Field) -> pa.ChunkedArray:
    if to.name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), to.type)])
    column = table[to.name]
    try:
        return column.cast(to.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        what = f"column {to.name!r} holds {column.type} in some rows and can't be read as {to.type}, as in others"
        raise BadList("the lists", None, what) from error


def uid_bytes(table: pa.Table) -> bytes:
    """The uids of all rows, one behind the other."""
    chunks = [chunk for chunk in table["uid"].chunks if len(chunk)]
    return b"".join(chunk.buffers()[1].slice(chunk.offset * 16, len(chunk) * 16) for chunk in chunks)


def uid_halves(table: pa.Table) -> U64s:
    """The uids as two numbers a row, whose order is that of the uids."""
    return np.frombuffer(uid_bytes(table), ">u8").astype(np.uint64).reshape(len(table), 2)
