"""One pair shard, from its work order to its receipt: fetch, filter, decode, store, commit. And which shards to do.

    work order ─ threads ─► fetch ► header ► filters ► decode ► filters ► resize ► JPEG ─► tar, sidecar ─► receipt
                            └──────── a pair that fails here gets a reason in its row

`ingest_shard` is a plain function: Ray is met only in `ingest`, which drives many of them. Every run does what is
planned and not committed, so every run is a resume. May not live here: how one URL is asked (ops/fetch.py), what a
filter wants (ops/filters.py), how a shard is committed (ops/shards.py).
"""

from __future__ import annotations

import random
import secrets
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from infra.store import Store, absolute, open_store
from ops import img2dataset_engine
from ops.adopt import is_adoption, take_adopted
from ops.attempts import Attempt, count_deferrals
from ops.errors import DamagedArtifact, StorageError
from ops.fetch import Fetched, Fetcher, FetchSettings
from ops.filters import FilterSettings, judge_file, judge_header, judge_pixels
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
    tar_members,
    write_table,
    write_tar,
)
from ops.sidecar import COLUMNS, Row, Spool, members, sidecar
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
    adopted: Literal["no", "first", "only"] = "no"
    """Whether its pictures lie in a folder that was adopted; with `only` what is not found there fails the shard."""

    @property
    def shard(self) -> int:
        """The shard's number."""
        return self.work_order.shard


def ingest_identity(plan: PlanSettings, filters: FilterSettings, picture: PictureSettings) -> dict[str, Any]:
    """What decides the content of PAIRS, for its recipe. Fetch and outage settings decide only when it comes."""
    return {"plan": asdict(plan), "filters": asdict(filters), "picture": asdict(picture)}


def start_pairs(store: Store, plan: PlanSettings, filters: FilterSettings, picture: PictureSettings) -> None:
    """Writes PAIRS/recipe.json, or checks that it says the same. Raises RecipeChanged, UsageError."""
    if picture.engine == "img2dataset":
        img2dataset_engine.check_installed()
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
    only_adopted: bool = False,
) -> list[IngestTask]:
    """The shards that are planned and not committed, in an order of this run's own: two runs side by side seldom take
    the same shard. `only_adopted`: those alone whose pictures lie in a folder that was adopted, and without the web."""
    done = committed_generations(open_store(location))
    run = secrets.token_hex(6)
    here = absolute(location)  # a worker has another directory
    task = partial(IngestTask, fetch=fetch, picture=picture, filters=filters, outage=outage, run=run)
    tasks = []
    for instalment in instalments:
        adopted: Literal["no", "first", "only"] = "no"
        if is_adoption(instalment):
            adopted = "only" if only_adopted else "first"
        elif only_adopted:
            continue
        orders = (order for order in instalment.work_orders if order.shard not in done)
        tasks += [task(here, order, accept_partial=accept_partial, adopted=adopted) for order in orders]
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
        rows = base.rows if base else [Row(said or "", why) for said, why in _verdicts(table)]
        asked = [
            i
            for i, (row, (said, _)) in enumerate(zip(rows, _verdicts(table), strict=True))
            if _is_asked(task, row, said)
        ]
        with Spool(scratch / "spool") as spool:
            for i, row in _rows_of(task, table, asked, spool, scratch, attempt).items():
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


def _is_asked(task: IngestTask, row: Row, planned: str | None) -> bool:
    """Whether this row is fetched by the task. What the plan decided (`planned`) is never asked for."""
    if task.generation == 0 or planned is not None:
        return planned is None
    return is_transient(row.status) if task.again == "transient" else row.status != SUCCESS


def _is_outage(store: Store, task: IngestTask, transient: int, asked: int) -> bool:
    if task.accept_partial or transient <= task.outage.max_transient * asked:
        return False
    return count_deferrals(store, task.shard, task.generation) < task.outage.max_deferrals


def _rows_of(
    task: IngestTask, table: pa.Table, asked: list[int], spool: Spool, scratch: Path, attempt: Attempt
) -> dict[int, Row]:
    """What becomes of these rows: pictures of an adopted folder are taken from it, the others are fetched."""
    rows = {} if task.adopted == "no" else take_adopted(table, asked, task.filters, spool, attempt)
    left = [i for i in asked if i not in rows]
    if not left:
        return rows
    if task.adopted == "only":
        raise StorageError(
            f"{table['adopted_from'][left[0]]}: {len(left)} of {len(asked)} pictures of shard {task.shard:05d} are not "
            "there any more, or not as they were looked at.",
            "Put the folder back and run the same adopt again, or let `armchair ingest` fetch them.",
        )
    if task.picture.engine == "img2dataset":
        urls, not_after_s = table["url"].take(left).to_pylist(), time.monotonic() + task.outage.shard_deadline_s
        fetched = img2dataset_engine.fetch_rows(
            urls, task.fetch, task.picture, task.filters, spool, scratch, attempt, not_after_s=not_after_s
        )
    else:
        fetched = _fetch_rows(task, table, left, spool, attempt)
    return rows | dict(zip(left, fetched, strict=True))


def _fetch_rows(task: IngestTask, table: pa.Table, asked: list[int], spool: Spool, attempt: Attempt) -> list[Row]:
    """Fetches and judges these rows in the fetcher's threads; decoding takes turns, since the task has one CPU."""
    keys, urls = table["key"].to_pylist(), table["url"].to_pylist()
    not_after_s = time.monotonic() + task.outage.shard_deadline_s
    turn = threading.Lock()

    def judged(i: int, answer: Fetched | Rejected | Exception) -> Row:
        row, jpeg = Row(), b""
        try:  # the one `except Exception` of the pipeline: a bug that one picture meets must not cost its shard
            if isinstance(answer, Exception):
                raise answer
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
        rows = [fetcher.submit(urls[i], partial(judged, i), not_after=not_after_s) for i in asked]
        return [row.result() for row in rows]


def _picture(answer: Fetched, row: Row, picture: PictureSettings, filters: FilterSettings) -> bytes:
    """Fills the row from a fetched body; returns the JPEG to store, or nothing where the row was rejected."""
    row.http_status, row.final_url, row.content_type = answer.http_status, answer.final_url, answer.content_type
    row.bytes_in, row.sha256 = len(answer.data), sha256(answer.data)
    if rejected := judge_file(len(answer.data), filters):
        row.reject(rejected)
        return b""
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
    rows: list[Row]
    tar: Path
    places: dict[str, list[tuple[str, int, int]]]

    @classmethod
    def read(cls, store: Store, task: IngestTask, scratch: Path) -> _Base:
        receipt = read_receipt(store, task.shard, task.generation - 1)
        if receipt.made_from["work_order"] != task.work_order.sha256:
            found = f"work order {receipt.made_from['work_order']}"
            raise DamagedArtifact(f"{store.location}/{receipt.key}", f"work order {task.work_order.sha256}", found)
        rows = [Row(**record) for record in read_table(store, receipt, list(COLUMNS)).to_pylist()]
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


def _none_before(key: str) -> NoReturn:
    raise AssertionError(f"{key} is kept, and nobody has its picture")


def _commit(
    store: Store,
    task: IngestTask,
    table: pa.Table,
    rows: list[Row],
    spool: Spool,
    base: _Base | None,
    scratch: Path,
    started_s: float,
) -> tuple[Literal["committed", "already"], Receipt]:
    """Writes tar and sidecar to scratch and publishes them; with the receipt that stands in the store now."""
    tar, parquet = scratch / "shard.tar", scratch / "shard.parquet"
    offsets = write_tar(tar, members(table, rows, spool, base.members if base else _none_before))
    for key, row in zip(table["key"].to_pylist(), rows, strict=True):
        row.tar_offset = offsets.get(f"{key}.jpg")
    row_groups = write_table(parquet, sidecar(table, rows))
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
