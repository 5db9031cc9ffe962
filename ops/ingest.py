"""One pair shard, from its work order to its receipt: fetch, filter, decode, store, commit. And which shards to do.

    work order ─ threads ─► fetch ► header ► filters ► decode ► filters ► resize ► JPEG ─► tar, sidecar ─► receipt
                            └──────── a pair that fails here gets a reason in its row

`ingest_shard` is a plain function: Ray is met only in `ingest`, which drives many of them. Every run does what is
planned and not committed, so every run is a resume. May not live here: how one URL is asked (ops/fetch.py), what a
filter wants (ops/filters.py), how a shard is committed (ops/shards.py).
"""

from __future__ import annotations

import json
import math
import random
import secrets
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from infra.store import Store, absolute, open_store
from ops.attempts import Attempt, count_deferrals
from ops.errors import DamagedArtifact
from ops.fetch import Fetched, Fetcher, FetchSettings
from ops.filters import FilterSettings, judge_header, judge_pixels
from ops.pictures import PictureSettings, decode, dhash, encode_jpeg, read_header, resize_short_side
from ops.plan import Instalment, PlanSettings, WorkOrder, read_instalments, read_work_order
from ops.reasons import SUCCESS, Reason, Rejected, is_transient
from ops.recipes import file_sha256, sha256, start_stage, versions
from ops.shards import (
    Receipt,
    committed_generations,
    download,
    publish,
    read_receipt,
    read_receipts,
    read_table,
    receipt_key,
    scratch_directory,
    sidecar_schema,
    tar_members,
    write_table,
    write_tar,
)
from ops.waves import ShardOutcome, Tick, drive, on_ray

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class OutageSettings:
    """When a shard is not committed because the web or our own network was ill. None of it bears identity."""

    max_transient: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the rows asked for that may fail for a transient reason; above it the shard is deferred."""
    max_deferrals: Annotated[int, Field(ge=0)] = 5
    """How often a shard is deferred before it commits with what it has."""
    shard_deadline_s: Annotated[float, Field(gt=0)] = 7200.0
    """Seconds for one shard; rows that were not asked for by then are `timeout`."""


@plain_dataclass(frozen=True)
class IngestTask:
    """One shard to do: everything a worker needs to know, and small.

    Generation 0 fetches every row without a verdict. A higher generation grows out of the one before: what was kept is
    copied, and of the rejected rows those are asked for again whose reason is transient, or all that were fetched
    (`again`).
    """

    location: str
    work_order: WorkOrder
    fetch: FetchSettings
    picture: PictureSettings
    filters: FilterSettings
    outage: OutageSettings
    generation: int = 0
    accept_partial: bool = False
    again: Literal["transient", "rejected"] = "transient"
    run: str = ""

    @property
    def shard(self) -> int:
        """The shard's number."""
        return self.work_order.shard


def ingest_identity(plan: PlanSettings, filters: FilterSettings, picture: PictureSettings) -> dict[str, Any]:
    """What decides the content of PAIRS, for its recipe. Fetch and outage settings decide only when it comes."""
    return {"plan": asdict(plan), "filters": asdict(filters), "picture": asdict(picture)}


def start_pairs(store: Store, plan: PlanSettings, filters: FilterSettings, picture: PictureSettings) -> None:
    """Writes PAIRS/recipe.json, or checks that it says the same. Raises RecipeChanged."""
    ways_out = (
        "Use another --into, or the old values. For a filter that became stricter, a drop list computed from the "
        "sidecars does the same without a new download."
    )
    start_stage(store, "pairs", ingest_identity(plan, filters, picture), {}, ways_out)


def pending_tasks(
    location: str,
    instalments: Sequence[Instalment],
    fetch: FetchSettings,
    picture: PictureSettings,
    filters: FilterSettings,
    outage: OutageSettings,
    *,
    accept_partial: bool = False,
) -> list[IngestTask]:
    """The shards that are planned and not committed, in an order of this run's own: two runs side by side seldom take
    the same shard."""
    done = committed_generations(open_store(location))
    run = secrets.token_hex(6)
    here = absolute(location)  # a worker has another directory
    tasks = [
        IngestTask(here, order, fetch, picture, filters, outage, accept_partial=accept_partial, run=run)
        for instalment in instalments
        for order in instalment.work_orders
        if order.shard not in done
    ]
    # Shuffled and not rotated: of two rotations the one behind skips what is done, catches up, and from there on both
    # fetch every shard side by side.
    random.Random(run).shuffle(tasks)
    return tasks


def rerun_tasks(
    location: str,
    fetch: FetchSettings,
    picture: PictureSettings,
    filters: FilterSettings,
    outage: OutageSettings,
    *,
    again: Literal["transient", "rejected"] = "transient",
    shards: Iterable[int] | None = None,
) -> list[IngestTask]:
    """The next generation of each committed shard (of `shards`, or of all) that has rows to ask for again."""
    store = open_store(location)
    orders = {order.shard: order for instalment in read_instalments(store) for order in instalment.work_orders}
    wanted = None if shards is None else set(shards)
    run = secrets.token_hex(6)
    here = absolute(location)  # a worker has another directory
    return [
        IngestTask(here, orders[shard], fetch, picture, filters, outage, receipt.generation + 1, again=again, run=run)
        for shard, receipt in read_receipts(store).items()
        if (wanted is None or shard in wanted)
        and any(count and (again == "rejected" or is_transient(reason)) for reason, count in receipt.rejected.items())
    ]


def ingest(
    location: str, tasks: Sequence[IngestTask], window: int | None = None, tick: Tick = lambda in_flight: None
) -> Iterator[ShardOutcome]:
    """Runs tasks of `pending_tasks` or `rerun_tasks` on the connected Ray; one outcome each, in the order of ends."""
    return drive(tasks, on_ray(ingest_shard, "ingest"), open_store(location), "pairs", window, tick)


def ingest_shard(task: IngestTask) -> ShardOutcome:
    """Does one shard and commits it. The same fetched bytes give the same shard, whatever the threads and latencies.

    Returns how it ended: `committed`, `already` (its receipt was there, another attempt was faster, or a rerun changed
    nothing) or `deferred` (the outage guard). Raises StorageError and OSError for what is no pair's fault.
    """
    store = open_store(task.location)
    if store.stat(receipt_key(task.shard, task.generation)):
        receipt = read_receipt(store, task.shard, task.generation)
        return ShardOutcome(
            task.shard, task.generation, "already", receipt.rows, receipt.kept, dict(sorted(receipt.rejected.items()))
        )
    with Attempt(store, "pairs", task.shard, task.generation, task.run) as attempt, scratch_directory() as scratch:
        table = read_work_order(store, task.work_order)
        base = _Base.read(store, task, scratch) if task.generation else None
        rows = base.rows if base else [_Row(said or "", why) for said, why in _verdicts(table)]
        asked = [
            i
            for i, (row, (said, _)) in enumerate(zip(rows, _verdicts(table), strict=True))
            if _is_asked(task, row, said)
        ]
        with _Spool(scratch / "spool") as spool:
            for i, row in zip(asked, _fetch_rows(task, table, asked, spool, attempt), strict=True):
                if not (base and is_transient(row.status)):  # a rerun that fails again has learned nothing
                    rows[i] = row
            counts = Counter(row.status for row in rows)
            transient = sum(count for status, count in counts.items() if is_transient(status))
            state: Literal["committed", "already", "deferred"]
            if not base and _is_outage(store, task, transient, len(asked)):
                state, stands = "deferred", None
            else:
                state, stands = _commit(store, task, table, rows, spool, base, scratch, attempt.started_s)
        kept = counts.pop(SUCCESS, 0)
        rejected = {status: count for status, count in sorted(counts.items())}
        attempt.end(state, rows=len(rows), asked=len(asked), kept=kept, rejected=rejected, transient=transient)
        if stands:  # after a lost race not what we found, which the record tells
            kept, rejected = stands.kept, dict(sorted(stands.rejected.items()))
        return ShardOutcome(
            task.shard, task.generation, state, len(rows), kept, rejected, seconds=round(attempt.seconds, 3)
        )


def _verdicts(table: pa.Table) -> list[tuple[str | None, str | None]]:
    """Status and detail that the plan decided for each row; null for a pair that is to be fetched."""
    return list(zip(table["status"].to_pylist(), table["detail"].to_pylist(), strict=True))


def _is_asked(task: IngestTask, row: _Row, planned: str | None) -> bool:
    """Whether this row is fetched by the task. What the plan decided (`planned`) is never asked for."""
    if task.generation == 0 or planned is not None:
        return planned is None
    return is_transient(row.status) if task.again == "transient" else row.status != SUCCESS


def _is_outage(store: Store, task: IngestTask, transient: int, asked: int) -> bool:
    if task.accept_partial or transient <= task.outage.max_transient * asked:
        return False
    return count_deferrals(store, task.shard, task.generation) < task.outage.max_deferrals


@plain_dataclass
class _Row:
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

    def reject(self, rejected: Rejected) -> _Row:
        self.status, self.detail = str(rejected.reason), rejected.detail or None
        self.http_status = rejected.http_status or self.http_status
        return self


COLUMNS = tuple(column.name for column in fields(_Row) if column.name != "spooled_at")


class _Spool:
    """JPEGs in the order of their arrival, on scratch: memory stays small, and the tar is assembled in key order."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._lock = threading.Lock()

    def __enter__(self) -> _Spool:
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


def _fetch_rows(task: IngestTask, table: pa.Table, asked: list[int], spool: _Spool, attempt: Attempt) -> list[_Row]:
    """Fetches and judges these rows with many threads; decoding takes turns, since the task has one CPU."""
    keys, urls = table["key"].to_pylist(), table["url"].to_pylist()
    not_after_s = time.monotonic() + task.outage.shard_deadline_s
    turn = threading.Lock()

    def pair(i: int) -> _Row:
        row, jpeg = _Row(), b""
        try:  # the one `except Exception` of the pipeline: a bug that one picture meets must not cost its shard
            answer = fetcher.fetch(urls[i], not_after=not_after_s)
            if isinstance(answer, Rejected):
                row.reject(answer)
            else:
                try:
                    with turn:
                        jpeg = _picture(answer, row, task.picture, task.filters)
                finally:
                    answer.release()
        except Exception:
            attempt.internal.append(f"{keys[i]} {urls[i]}\n{traceback.format_exc()}")
            row.reject(Rejected(Reason.INTERNAL, "the traceback is in the shard's attempt record"))
        if row.status == SUCCESS:
            row.spooled_at, row.jpg_size = spool.append(jpeg), len(jpeg)
        attempt.rows_done += 1
        return row

    with Fetcher(task.fetch) as fetcher:
        pool = ThreadPoolExecutor(max(1, min(task.fetch.threads, len(asked))), "fetch")
        try:
            return list(pool.map(pair, asked))
        finally:
            fetcher.close()  # before the pool is waited for: open requests end now
            pool.shutdown(cancel_futures=True)


def _picture(answer: Fetched, row: _Row, picture: PictureSettings, filters: FilterSettings) -> bytes:
    """Fills the row from a fetched body; returns the JPEG to store, or nothing where the row was rejected."""
    row.http_status, row.final_url, row.content_type = answer.http_status, answer.final_url, answer.content_type
    row.bytes_in, row.sha256 = len(answer.data), sha256(answer.data)
    header = read_header(answer.data)
    if isinstance(header, Rejected):
        row.reject(header)
        return b""
    row.original_width, row.original_height = header.width, header.height
    row.exif_orientation = header.orientation
    if rejected := judge_header(header, filters):
        row.reject(rejected)
        return b""
    pixels = decode(answer.data, header, picture.short_side_px)
    if isinstance(pixels, Rejected):
        row.reject(pixels)
        return b""
    if rejected := judge_pixels(pixels, filters):
        row.reject(rejected)
        return b""
    pixels = resize_short_side(pixels, picture.short_side_px)
    row.height, row.width = pixels.shape[:2]
    row.dhash = dhash(pixels)
    row.status = SUCCESS
    return encode_jpeg(pixels, picture.jpeg_quality)


@plain_dataclass
class _Base:
    """The generation that a rerun grows out of: its receipt, its rows, and its tar on scratch."""

    receipt: Receipt
    rows: list[_Row]
    tar: Path
    places: dict[str, list[tuple[str, int, int]]]

    @classmethod
    def read(cls, store: Store, task: IngestTask, scratch: Path) -> _Base:
        receipt = read_receipt(store, task.shard, task.generation - 1)
        if receipt.made_from["work_order"] != task.work_order.sha256:
            found = f"work order {receipt.made_from['work_order']}"
            raise DamagedArtifact(f"{store.location}/{receipt.key}", f"work order {task.work_order.sha256}", found)
        rows = [_Row(**record) for record in read_table(store, receipt, list(COLUMNS)).to_pylist()]
        tar = scratch / "base.tar"
        download(store, receipt.files["tar"], tar)
        places: dict[str, list[tuple[str, int, int]]] = {}
        for name, at, size in tar_members(tar):
            places.setdefault(name.partition(".")[0], []).append((name, at, size))
        return cls(receipt, rows, tar, places)

    def members(self, key: str) -> Iterator[tuple[str, bytes]]:
        """The files of one kept pair, byte for byte."""
        with self.tar.open("rb") as file:
            for name, at, size in self.places[key]:
                file.seek(at)
                yield name, file.read(size)


def _commit(
    store: Store,
    task: IngestTask,
    table: pa.Table,
    rows: list[_Row],
    spool: _Spool,
    base: _Base | None,
    scratch: Path,
    started_s: float,
) -> tuple[Literal["committed", "already"], Receipt]:
    """Writes tar and sidecar to scratch and publishes them; with the receipt that stands in the store now."""
    tar, parquet = scratch / "shard.tar", scratch / "shard.parquet"
    offsets = write_tar(tar, _members(table, rows, spool, base))
    for key, row in zip(table["key"].to_pylist(), rows, strict=True):
        row.tar_offset = offsets.get(f"{key}.jpg")
    row_groups = write_table(parquet, _sidecar(table, rows))
    made_from = {"work_order": task.work_order.sha256}
    if base:
        if [ref.sha256 for ref in (base.receipt.files["tar"], base.receipt.files["parquet"])] == [
            file_sha256(tar),
            file_sha256(parquet),
        ]:
            return "already", base.receipt  # asked again, and nothing changed: no generation is spent on it
        made_from["generation"] = base.receipt.digest
    counts = Counter(row.status for row in rows)
    kept = counts.pop(SUCCESS, 0)
    receipt = Receipt(
        stage="pairs",
        shard=task.shard,
        generation=task.generation,
        made_from=made_from,
        rows=len(rows),
        kept=kept,
        rejected=dict(counts),
        row_groups=row_groups,
        versions=versions(),
    )
    published = publish(store, receipt, {"tar": tar, "parquet": parquet}, started_s=started_s)
    return ("committed", published) if published else ("already", read_receipt(store, task.shard, task.generation))


def _members(table: pa.Table, rows: list[_Row], spool: _Spool, base: _Base | None) -> Iterator[tuple[str, bytes]]:
    """KEY.jpg KEY.json KEY.txt of every kept pair, in the order of keys (which is that of rows)."""
    for record, row in zip(table.to_pylist(), rows, strict=True):
        if row.status != SUCCESS:
            continue
        key = record["key"]
        if row.spooled_at is None:
            assert base is not None
            yield from base.members(key)
            continue
        assert row.jpg_size is not None
        yield f"{key}.jpg", spool.read(row.spooled_at, row.jpg_size)
        yield f"{key}.json", _describe(record, row)
        yield f"{key}.txt", (record["caption"] or "").encode()


def _describe(record: dict[str, Any], row: _Row) -> bytes:
    """KEY.json: the row of the work order and what ingestion found out, but not where it lies in the tar."""
    found = {name: getattr(row, name) for name in COLUMNS if name not in ("detail", "tar_offset")}
    known_to_json = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in (record | found).items()
        if name != "detail"
    }
    return json.dumps(known_to_json, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str).encode()


def _sidecar(table: pa.Table, rows: list[_Row]) -> pa.Table:
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
