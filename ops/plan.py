"""The plan: which pairs there are, in which shard and row each stands. A chain of instalments and their work orders.

Lives here: uids, the split, the order of rows, work orders and instalments, and how two planners keep apart.
May not live here: reading list files (ops/lists.py), fetching. Only what an instalment names exists: work orders are
content-addressed, the instalment is written last and only if absent.

    PAIRS/plan/part-0000.json                 digests of lists, first shard, work orders (rows, sha256)
    PAIRS/plan/00012-<sha256[:16]>.parquet    work order of shard 12
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings_dataclass

from infra.metrics import Tell, untold
from infra.store import Store
from ops.errors import BadList, DamagedArtifact, StorageError
from ops.filters import FilterSettings, judge_caption
from ops.lists import Columns as Columns
from ops.lists import ListPath, Rows, find_lists, fingerprint, read_rows, stamp, text
from ops.reasons import Reason
from ops.recipes import file_sha256, parse_json, sha256
from ops.shards import scratch_directory

PLAN = "plan/"
PLACE = ("list_number", "list_line")
"""Columns of a work order's file: which of the instalment's lists a row is from, and its line or row there, from 1."""
INSTALMENT = re.compile(r"plan/part-\d+\.json")
RUN_ROWS = 131_072
RUN_BYTES = 128 << 20
"""A sorted run on scratch is written when it has that many rows, or bytes (columns of embeddings)."""
BUCKET_BYTES = 16 << 20
"""Bytes of the lists (packed ones counted six-fold) for one bucket; a bucket of all runs is in memory at a time."""


@settings_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class PlanSettings:
    """How pairs are cut into shards."""

    pairs_per_shard: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Rows of a work order; the last one of an instalment may have fewer. img2dataset's default."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of pairs kept from training, chosen by uid, for lists (or rows) that do not say `split` themselves."""


@dataclass(frozen=True)
class ListFile:
    """A list that was planned. The digest is its identity; `label`, the path it was read from, is for people."""

    sha256: str
    label: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class WorkOrder:
    """The rows of one shard: a Parquet file of the store."""

    shard: int
    rows: int
    key: str
    sha256: str


@dataclass(frozen=True)
class Instalment:
    """One extension of the plan: the lists it covers and the work orders it made of them."""

    number: int
    lists: tuple[ListFile, ...]
    """In the order of their digests: `list_number` of a work order's row counts in it."""
    first_shard: int
    work_orders: tuple[WorkOrder, ...]
    previous: str | None = None
    """Sha256 of the instalment before: the chain."""

    @property
    def rows(self) -> int:
        """Pairs planned by this instalment."""
        return sum(order.rows for order in self.work_orders)


@dataclass(frozen=True)
class Extension:
    """What `extend_plan` did. `instalment` is the new one, or None when every list was covered already."""

    instalment: Instalment | None
    instalments: tuple[Instalment, ...]
    """The whole plan, the new instalment included."""
    skipped: tuple[str, ...] = ()
    """Lists whose bytes are planned already."""
    changed: tuple[str, ...] = ()
    """Files of a watched folder whose bytes are others than those that were planned: skipped, to be reported."""
    passed_over: tuple[str, ...] = ()
    """Files of a folder that are no lists by their name."""


def pair_uid(url: bytes | None, caption: bytes | None) -> bytes:
    """The identity of a pair: blake2b-128(url ‖ 0x00 ‖ caption) over the raw bytes. A null is told from an empty text.

    >>> pair_uid(b"http://a/1.jpg", b"a cat").hex()
    '67081cd31707ab195a3f3f3a68202729'
    >>> pair_uid(b"http://a/1.jpg", None) == pair_uid(b"http://a/1.jpg", b"")
    False
    """
    # blake2b's personalisation makes another hash function for each kind of null: no text can collide with it.
    person = b"" if url is not None and caption is not None else b"null:%d%d" % (url is None, caption is None)
    return hashlib.blake2b((url or b"") + b"\0" + (caption or b""), digest_size=16, person=person).digest()


def read_instalments(store: Store) -> list[Instalment]:
    """The plan, in order. Raises DamagedArtifact where an instalment is missing from the chain or was altered."""
    found: list[Instalment] = []
    previous: str | None = None
    shard = 0
    parts = [entry.key for entry in store.list(f"{PLAN}part-") if INSTALMENT.fullmatch(entry.key)]
    for key in sorted(parts, key=lambda key: (len(key), key)):
        place, expected = f"{store.location}/{key}", _instalment_key(len(found))
        if key != expected:
            raise DamagedArtifact(f"{store.location}/{expected}", "an instalment", f"none, but {key}")
        data = store.read(key)
        read = parse_json(data, place)
        try:
            instalment = Instalment(
                number=read["number"],
                lists=tuple(ListFile(**item) for item in read["lists"]),
                first_shard=read["first_shard"],
                work_orders=tuple(WorkOrder(**item) for item in read["work_orders"]),
                previous=read["previous"],
            )
        except (KeyError, TypeError) as error:
            raise DamagedArtifact(place, "an instalment of format 1", f"another form ({error})") from error
        if instalment.previous != previous:
            before = f"{store.location}/{_instalment_key(len(found) - 1)}"
            raise DamagedArtifact(before, f"sha256 {instalment.previous}", f"sha256 {previous}")
        if instalment.first_shard != shard:
            raise DamagedArtifact(place, f"first shard {shard}", f"first shard {instalment.first_shard}")
        found.append(instalment)
        shard += len(instalment.work_orders)
        previous = sha256(data)
    return found


def read_work_order(store: Store, work_order: WorkOrder) -> pa.Table:
    """The rows of a shard: `key uid url caption split weight status detail` + the user's columns.

    `status` is null for a pair that is to be fetched, else the reason that the plan decided. Where the lists had each
    row (`PLACE`) stands in the file alone, so that no sidecar gets it: ops/why.py reads it. Raises DamagedArtifact.
    """
    place = f"{store.location}/{work_order.key}"
    try:
        data = store.read(work_order.key)
    except FileNotFoundError:
        raise DamagedArtifact(place, work_order.sha256, "no file") from None
    if (found := sha256(data)) != work_order.sha256:
        raise DamagedArtifact(place, work_order.sha256, found)
    table = pq.read_table(io.BytesIO(data))
    return table.select([name for name in table.column_names if name not in PLACE])


def extend_plan(
    store: Store,
    lists: Sequence[str],
    settings: PlanSettings,
    filters: FilterSettings,
    columns: Columns,
    tell: Tell = untold,
) -> Extension:
    """Plans the lists (files or folders) that are not planned yet, as one new instalment.

    Memory does not grow with the lists; scratch space (TMPDIR) does: about their unpacked size. Of two planners at
    once one wins an instalment; the other looks again at what is left to plan and takes the next number. A planner
    that is killed leaves nothing that counts. Raises BadList before anything is written to the plan.
    """
    paths, passed_over = find_lists(lists)
    prints = [(path, *fingerprint(path.path)) for path in paths]
    while True:
        instalments = read_instalments(store)
        covered = {planned.sha256 for instalment in instalments for planned in instalment.lists}
        labels = {planned.label for instalment in instalments for planned in instalment.lists}
        skipped: list[str] = []
        changed: list[str] = []
        todo: dict[str, tuple[ListPath, int, tuple[int, int, int]]] = {}
        for path, digest, size, mark in prints:
            if digest in covered or digest in todo:
                skipped.append(path.label)
            elif path.watched and path.label in labels:
                changed.append(path.label)
            else:
                todo[digest] = (path, size, mark)
        extension = Extension(None, tuple(instalments), tuple(skipped), tuple(changed), tuple(passed_over))
        if not todo:
            return extension
        with scratch_directory() as scratch:
            new = _plan(store, todo, instalments, settings, filters, columns, scratch, tell)
        if new is not None:
            return Extension(new, (*instalments, new), extension.skipped, extension.changed, extension.passed_over)
        # Another planner took our number: what it planned is covered now, the rest is planned again.


def _plan(
    store: Store,
    todo: dict[str, tuple[ListPath, int, tuple[int, int, int]]],
    instalments: Sequence[Instalment],
    settings: PlanSettings,
    filters: FilterSettings,
    columns: Columns,
    scratch: Path,
    tell: Tell,
) -> Instalment | None:
    """One instalment, or None if another planner was first."""
    size = sum(bytes * (6 if path.path.suffix in (".gz", ".parquet") else 1) for path, bytes, _ in todo.values())
    runs = _Runs(scratch, buckets=min(1024, 1 + size // BUCKET_BYTES))
    planned: list[ListFile] = []
    read = 0
    # In the order of digests: names and the order of the command line decide nothing.
    for index, (digest, (path, bytes, mark)) in enumerate(sorted(todo.items())):
        count = 0
        for rows in read_rows(path, columns, caption_required=filters.caption_required, scratch=scratch):
            count += len(rows.urls)
            read += len(rows.urls)
            tell("rows read", read, None)
            runs.add(_placed(_judged(rows, settings, filters), index, rows.lines), path.label)
        if stamp(path.path) != mark:
            raise BadList(path.label, None, "was changed while it was read")
        planned.append(ListFile(digest, path.label, count, bytes))
    runs.flush()
    first_shard = sum(len(instalment.work_orders) for instalment in instalments)
    work_orders: list[WorkOrder] = []
    for shard, table in enumerate(_cut(runs.sorted(), settings.pairs_per_shard), first_shard):
        work_orders.append(_publish(store, table, shard, settings, scratch))
        tell("shards planned", len(work_orders), -(-read // settings.pairs_per_shard))
    number = len(instalments)
    previous = sha256(store.read(_instalment_key(number - 1))) if number else None
    instalment = Instalment(number, tuple(planned), first_shard, tuple(work_orders), previous)
    there = {entry.key for entry in store.list(PLAN)}
    if missing := [order.key for order in work_orders if order.key not in there]:
        raise StorageError(f"{store.location}/{missing[0]} was removed while the plan was made.", "Run it again.")
    body = {"format": 1, **asdict(instalment)}
    return instalment if store.put(_instalment_key(number), json.dumps(body, indent=1).encode()) else None


def _instalment_key(number: int) -> str:
    return f"{PLAN}part-{number:04d}.json"


def _publish(store: Store, rows: pa.Table, shard: int, settings: PlanSettings, scratch: Path) -> WorkOrder:
    width = max(4, len(str(settings.pairs_per_shard - 1)))
    keys = pa.array([f"{shard:05d}{row:0{width}d}" for row in range(len(rows))], pa.string())
    file = scratch / "work-order.parquet"
    # One row group: a work order is always read whole.
    pq.write_table(rows.add_column(0, "key", keys), file, compression="zstd", row_group_size=len(rows))
    digest = file_sha256(file)
    key = f"{PLAN}{shard:05d}-{digest[:16]}.parquet"
    if not store.put(key, file):
        # Left by a planner that was killed. Written again, so that a sweep does not find it old.
        store.put(key, file, if_absent=False)
    return WorkOrder(shard, len(rows), key, digest)


def _judged(rows: Rows, settings: PlanSettings, filters: FilterSettings) -> pa.Table:
    """The rows of a work order (without their keys), in list order; `uid` still binary."""
    count = len(rows.urls)
    uids = b"".join(map(pair_uid, rows.urls, rows.captions))
    urls, broken_urls = text(pa.array(rows.urls, pa.binary()))
    captions, broken_captions = text(pa.array(rows.captions, pa.binary()))
    statuses: list[str | None] = [None] * count
    details: list[str | None] = [None] * count
    for row, caption in enumerate(captions.to_pylist()):
        if not rows.urls[row]:
            statuses[row], details[row] = Reason.URL_INVALID, "no URL"
        elif row in broken_urls:
            statuses[row], details[row] = Reason.URL_INVALID, "not UTF-8"
        elif row in broken_captions:
            statuses[row], details[row] = Reason.CAPTION_ENCODING, "not UTF-8"
        elif rejected := judge_caption(caption, filters):
            statuses[row], details[row] = rejected.reason, rejected.detail
    # Rows are ordered by the uid's first half; the split looks at the second, so that it is in every shard.
    low = np.frombuffer(uids, ">u8").reshape(count, 2)[:, 1]
    held_out = low.astype(np.float64) / 2.0**64 < settings.held_out
    splits = ["held_out" if held else "train" for held in held_out]
    if rows.splits is not None:
        splits = [said or chosen for said, chosen in zip(rows.splits, splits, strict=True)]
    table = pa.table(
        {
            "uid": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), count, [None, pa.py_buffer(uids)]),
            "url": urls,
            "caption": captions,
            "split": pa.array(splits, pa.string()),
            "weight": pa.array(np.ones(count) if rows.weights is None else rows.weights, pa.float64()),
            "status": pa.array(statuses, pa.string()),
            "detail": pa.array(details, pa.string()),
        }
    )
    for name in rows.extra.column_names:
        table = table.append_column(name, rows.extra[name])
    return table.replace_schema_metadata(None)


def _placed(table: pa.Table, number: int, lines: Sequence[int]) -> pa.Table:
    """With the list of each row and its line there: what `armchair why` tells, and no part of a pair's identity."""
    columns = (np.full(len(table), number, np.int32), np.asarray(lines, np.int64))
    for name, column in zip(PLACE, columns, strict=True):
        table = table.append_column(name, pa.array(column))
    return table


@dataclass
class _Runs:
    """An external sort by uid: sorted runs on scratch, each cut at the same `buckets` places of the uid's range."""

    scratch: Path
    buckets: int
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    waiting: list[pa.Table] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def add(self, table: pa.Table, label: str) -> None:
        """Takes rows in list order. Raises BadList if a column's type conflicts with the rows before."""
        for column in table.schema:
            known = self.schema.field(column.name) if column.name in self.schema.names else None
            try:
                pa.unify_schemas([pa.schema([f]) for f in (known, column) if f], promote_options="permissive")
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                assert known is not None
                what = f"column {column.name!r} holds {column.type} here and {known.type} in the rows or lists before"
                raise BadList(label, None, what) from None
        self.schema = pa.unify_schemas([self.schema, table.schema], promote_options="permissive")
        self.waiting.append(table)
        if sum(map(len, self.waiting)) >= RUN_ROWS or sum(table.nbytes for table in self.waiting) >= RUN_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as a sorted run."""
        if not self.waiting:
            return
        table = _by_uid(self._unified(self.waiting))
        self.waiting = []
        high, _ = _halves(table)
        edges = [(bucket << 64) // self.buckets for bucket in range(1, self.buckets)]
        cuts = [0, *np.searchsorted(high, np.array(edges, np.uint64)).tolist(), len(table)]
        path = self.scratch / f"run-{len(self.files):06d}.arrow"
        batch = table.combine_chunks()
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            for start, stop in pairwise(cuts):
                part = batch.slice(start, stop - start).to_batches()
                writer.write_batch(part[0] if part else pa.RecordBatch.from_pylist([], schema=batch.schema))
        self.files.append(path)

    def sorted(self) -> Iterator[pa.Table]:
        """All rows in the order of their uids (equal ones in the order they came), a bucket at a time."""
        for bucket in range(self.buckets):
            parts = []
            for path in self.files:
                with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source) as run:
                    parts.append(pa.Table.from_batches([run.get_batch(bucket)]))
            if any(len(part) for part in parts):
                yield _by_uid(self._unified(parts))

    def _unified(self, tables: list[pa.Table]) -> pa.Table:
        return pa.concat_tables([pa.table([_cast(table, f) for f in self.schema], self.schema) for table in tables])


def _cast(table: pa.Table, to: pa.Field) -> pa.ChunkedArray:
    if to.name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), to.type)])
    column = table[to.name]
    try:
        return column.cast(to.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        what = f"column {to.name!r} holds {column.type} in some rows and can't be read as {to.type}, as in others"
        raise BadList("the lists", None, what) from error


def _halves(table: pa.Table) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    raw = b"".join(
        chunk.buffers()[1].slice(chunk.offset * 16, len(chunk) * 16).to_pybytes()
        for chunk in table["uid"].chunks
        if len(chunk)
    )
    halves = np.frombuffer(raw, ">u8").astype(np.uint64).reshape(len(table), 2)
    return halves[:, 0], halves[:, 1]


def _by_uid(table: pa.Table) -> pa.Table:
    high, low = _halves(table)
    return table.take(pa.array(np.lexsort((low, high))))  # stable: equal uids keep their order


def _cut(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Tables of `rows` rows (the last may be shorter), with the uid as hex text."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += len(table)
        while count >= rows:
            whole = pa.concat_tables(waiting)
            yield _with_hex(whole.slice(0, rows))
            waiting, count = [whole.slice(rows)], count - rows
    if count:
        yield _with_hex(pa.concat_tables(waiting))


def _with_hex(table: pa.Table) -> pa.Table:
    raw = b"".join(table["uid"].to_pylist())
    digits = raw.hex().encode()
    offsets = np.arange(0, len(digits) + 1, 32, dtype=np.int32)
    uids = pa.StringArray.from_buffers(len(table), pa.py_buffer(offsets), pa.py_buffer(digits))
    return table.set_column(table.column_names.index("uid"), "uid", uids).combine_chunks()
