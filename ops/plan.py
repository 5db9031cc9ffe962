"""The plan: which pairs there are, in which shard and row each stands. A chain of instalments and their work orders.

Lives here: uids, the split, work orders and instalments, and how two planners keep apart. May not live here: reading
list files (ops/lists.py), the order of rows (ops/uid_sort.py), fetching. Only what an instalment names exists: work
orders are content-addressed, the instalment is written last and only if absent.

    PAIRS/plan/part-0000.json                   digests of lists, first shard, work orders (rows, sha256)
    PAIRS/plan/00012-<sha256[:16]>.parquet      work order of shard 12
    PAIRS/plan/urls-0000-<sha256[:16]>.u64      hashes of the URLs that part-0000 asks for (ops/url_duplicates.py)
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings_dataclass

from infra.metrics import Tell, untold
from infra.store import Store
from ops.errors import BadList, DamagedArtifact, StorageError, UsageError
from ops.filters import FilterSettings, judge_captions
from ops.list_digests import Digested, digest_lists
from ops.lists import Columns as Columns
from ops.lists import Rows, find_lists, list_format, read_rows, stamp, text
from ops.reasons import Reason
from ops.recipes import file_sha256, parse_json, sha256
from ops.shards import scratch_directory
from ops.uid_sort import UidSort, uid_bytes, uid_halves
from ops.url_duplicates import LostRows, UrlDuplicates, UrlIndex, url_hashes

PLAN = "plan/"
PLACE = ("list_number", "list_line")
"""Columns of a work order's file: which of the instalment's lists a row is from, and its line or row there, from 1."""
NUMBER = "list_row"
"""Column of the rows on scratch: their numbers in the instalment, in the order in which they were read."""
INSTALMENT = re.compile(r"plan/part-\d+\.json")


@settings_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class PlanSettings:
    """How pairs are cut into shards."""

    pairs_per_shard: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Rows of a work order; the last one of an instalment may have fewer. img2dataset's default."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of pairs kept from training, chosen by uid, for lists (or rows) that do not say `split` themselves."""
    unique_urls: bool = True
    """Whether a URL is asked for once: of the pairs with one URL the first of the plan stays, and the others get the
    reason `url_duplicate`. False for pictures with several captions each."""


@dataclass(frozen=True)
class ListFile:
    """A list that was planned. The digest is its identity; `label`, the path it was read from, is for people.

    `columns` are those that it was read with: others would make other pairs of the same bytes.
    """

    sha256: str
    label: str
    rows: int
    bytes: int
    columns: Columns = field(default_factory=Columns)


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
    urls: UrlIndex | None = None
    """The URLs that it leaves to be fetched; None with `plan.unique_urls = false`."""
    previous: str | None = None
    """Sha256 of the instalment before: the chain."""

    @property
    def rows(self) -> int:
        """Pairs planned by this instalment."""
        return sum(order.rows for order in self.work_orders)

    @property
    def keys(self) -> tuple[str, ...]:
        """The files of the store that it names."""
        return (*(order.key for order in self.work_orders), *([self.urls.key] if self.urls else []))


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
                lists=tuple(ListFile(**item | {"columns": Columns(**item["columns"])}) for item in read["lists"]),
                first_shard=read["first_shard"],
                work_orders=tuple(WorkOrder(**item) for item in read["work_orders"]),
                urls=UrlIndex(**read["urls"]) if read["urls"] else None,
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
    """The rows of a shard: `key uid url caption split weight status detail language language_probability` + the user's.

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
    table = pq.ParquetFile(io.BytesIO(data)).read()  # read_table makes a dataset of it first, a third more
    return table.select([name for name in table.column_names if name not in PLACE])


def extend_plan(
    store: Store,
    lists: Sequence[str],
    settings: PlanSettings,
    filters: FilterSettings,
    columns: Columns,
    tell: Tell = untold,
    also: Sequence[ListFile] = (),
) -> Extension:
    """Plans the lists (files or folders) that are not planned yet, as one new instalment.

    `also` are lists that the new instalment covers without reading them: their pairs are in the others.

    Memory does not grow with the lists; scratch space (TMPDIR) does: about their unpacked size. Of two planners at
    once one wins an instalment; the other looks again at what is left to plan and takes the next number. A planner
    that is killed leaves nothing that counts. Raises BadList before anything is written to the plan.
    """
    paths, passed_over = find_lists(lists)
    digested = digest_lists(store, paths)
    while True:
        instalments = read_instalments(store)
        todo, skipped, changed = _compare(digested, instalments, columns)
        extension = Extension(None, tuple(instalments), skipped, changed, tuple(passed_over))
        if not todo:
            return extension
        with scratch_directory() as scratch:
            new = _plan(store, todo, instalments, settings, filters, columns, scratch, tell, also)
        if new is not None:
            return Extension(new, (*instalments, new), extension.skipped, extension.changed, extension.passed_over)
        # Another planner took our number: what it planned is covered now, the rest is planned again.


def _compare(
    digested: Sequence[Digested], instalments: Sequence[Instalment], columns: Columns
) -> tuple[dict[str, Digested], tuple[str, ...], tuple[str, ...]]:
    """The lists to plan, by digest; the labels of those that are planned already, and of watched ones that changed.

    Raises UsageError for a list that was planned with other columns: it would make other pairs of the same bytes.
    """
    known = [planned for instalment in instalments for planned in instalment.lists]
    covered, labels = {planned.sha256: planned.columns for planned in known}, {planned.label for planned in known}
    todo: dict[str, Digested] = {}
    skipped: list[str] = []
    changed: list[str] = []
    for one in digested:
        label = one.path.label
        was = covered.get(one.sha256)
        if was is not None and was != columns and list_format(one.path.path) != "txt":
            raise UsageError(
                f"{label} was planned with --url-col {was.url} --caption-col {was.caption}, now they are "
                f"{columns.url} and {columns.caption}.",
                "Name the columns as they were, the new lists alone, or another --into.",
            )
        if was is not None or one.sha256 in todo:
            skipped.append(label)
        elif one.path.watched and label in labels:
            changed.append(label)
        else:
            todo[one.sha256] = one
    return todo, tuple(skipped), tuple(changed)


def would_grow(store: Store, lists: Sequence[str], instalments: Sequence[Instalment], columns: Columns) -> bool:
    """Whether `extend_plan` would add an instalment to these. Raises BadList, UsageError as it does."""
    todo, _, _ = _compare(digest_lists(store, find_lists(lists)[0]), instalments, columns)
    return bool(todo)


def _plan(
    store: Store,
    todo: Mapping[str, Digested],
    instalments: Sequence[Instalment],
    settings: PlanSettings,
    filters: FilterSettings,
    columns: Columns,
    scratch: Path,
    tell: Tell,
    also: Sequence[ListFile],
) -> Instalment | None:
    """One instalment, or None if another planner was first."""
    size = sum(one.bytes * (6 if one.path.path.suffix in (".gz", ".parquet") else 1) for one in todo.values())
    planned: list[ListFile] = []
    work_orders: list[WorkOrder] = []
    number, read = len(instalments), 0
    first_shard = sum(len(instalment.work_orders) for instalment in instalments)
    with UidSort(scratch, size) as rows_by_uid, UrlDuplicates(scratch) as duplicates:
        # In the order of digests: names and the order of the command line decide nothing.
        for index, (digest, one) in enumerate(sorted(todo.items())):
            first, label = read, one.path.label
            for rows in read_rows(one.path, columns, caption_required=filters.caption_required, scratch=scratch):
                table = _judged(rows, settings, filters)
                if settings.unique_urls:
                    _add_urls(duplicates, table, read)
                rows_by_uid.add(_placed(table, index, rows.lines, read), label)
                read += len(table)
                tell("rows read", read, None)
            if stamp(one.path.path) != one.stamp:
                raise BadList(label, None, "was changed while it was read")
            planned.append(ListFile(digest, label, read - first, one.bytes, columns))
        lost, urls = LostRows(read), None
        if settings.unique_urls:
            earlier = [instalment.urls for instalment in instalments if instalment.urls]
            lost, left = duplicates.find(store, earlier, read, scratch / "index.u64", tell)
            digest = file_sha256(scratch / "index.u64")
            urls = UrlIndex(f"{PLAN}urls-{number:04d}-{digest[:16]}.u64", left, digest)
            _put(store, urls.key, scratch / "index.u64")
        tables = (_without_lost(table, lost) for table in rows_by_uid.sorted())
        for shard, table in enumerate(_cut(tables, settings.pairs_per_shard), first_shard):
            work_orders.append(_publish(store, table, shard, settings, scratch))
            tell("shards planned", len(work_orders), -(-read // settings.pairs_per_shard))
    previous = sha256(store.read(_instalment_key(number - 1))) if number else None
    planned += [file for file in also if file.sha256 not in todo]
    instalment = Instalment(number, tuple(planned), first_shard, tuple(work_orders), urls, previous)
    there = {entry.key for entry in store.list(PLAN)}
    if missing := [key for key in instalment.keys if key not in there]:
        raise StorageError(f"{store.location}/{missing[0]} was removed while the plan was made.", "Run it again.")
    body = {"format": 1, **asdict(instalment)}
    return instalment if store.put(_instalment_key(number), json.dumps(body, indent=1).encode()) else None


def _add_urls(duplicates: UrlDuplicates, table: pa.Table, first: int) -> None:
    """The rows of a batch that are to be fetched, the first of which is row number `first`."""
    asked = np.flatnonzero(table["status"].is_null().to_numpy())
    urls = table["url"].take(pa.array(asked)).cast(pa.binary())
    duplicates.add(url_hashes(urls.to_pylist()), uid_halves(table)[asked, 0], (first + asked).astype(np.uint64))


def _without_lost(table: pa.Table, lost: LostRows) -> pa.Table:
    """The rows with their last verdict, and without their numbers."""
    status = table.column_names.index("status")
    gone = pa.array(lost.has(table[NUMBER].to_numpy()))
    verdicts = pc.if_else(gone, str(Reason.URL_DUPLICATE), table["status"])
    return table.set_column(status, "status", verdicts).drop_columns([NUMBER])


def _instalment_key(number: int) -> str:
    return f"{PLAN}part-{number:04d}.json"


def _publish(store: Store, rows: pa.Table, shard: int, settings: PlanSettings, scratch: Path) -> WorkOrder:
    width = max(4, len(str(settings.pairs_per_shard - 1)))
    places = pc.utf8_lpad(pa.array(np.arange(len(rows))).cast(pa.string()), width, "0")
    keys = pc.binary_join_element_wise(f"{shard:05d}", places, "")
    file = scratch / "work-order.parquet"
    # One row group: a work order is always read whole.
    pq.write_table(rows.add_column(0, "key", keys), file, compression="zstd", row_group_size=len(rows))
    digest = file_sha256(file)
    key = f"{PLAN}{shard:05d}-{digest[:16]}.parquet"
    _put(store, key, file)
    return WorkOrder(shard, len(rows), key, digest)


def _put(store: Store, key: str, file: Path) -> None:
    if not store.put(key, file):
        # Left by a planner that was killed. Written again, so that a sweep does not find it old.
        store.put(key, file, if_absent=False)


def _judged(rows: Rows, settings: PlanSettings, filters: FilterSettings) -> pa.Table:
    """The rows of a work order (without their keys), in list order; `uid` still binary."""
    count = len(rows.urls)
    uids = b"".join(map(pair_uid, rows.urls, rows.captions))
    urls, broken_urls = text(pa.array(rows.urls, pa.binary()))
    captions, broken_captions = text(pa.array(rows.captions, pa.binary()))
    verdicts = judge_captions(captions, filters)
    statuses, details = verdicts.reasons, verdicts.details
    for row in broken_captions:
        statuses[row], details[row] = Reason.CAPTION_ENCODING, "not UTF-8"
        verdicts.languages[row] = verdicts.probabilities[row] = None
    for row, url in enumerate(rows.urls):
        if not url:
            statuses[row], details[row] = Reason.URL_INVALID, "no URL"
        elif row in broken_urls:
            statuses[row], details[row] = Reason.URL_INVALID, "not UTF-8"
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
            "language": pa.array(verdicts.languages, pa.string()),
            "language_probability": pa.array(verdicts.probabilities, pa.float32()),
        }
    )
    for name in rows.extra.column_names:
        table = table.append_column(name, rows.extra[name])
    return table.replace_schema_metadata(None)


def _placed(table: pa.Table, list_number: int, lines: Sequence[int], first: int) -> pa.Table:
    """With the list of each row and its line there, which `armchair why` tells and which are no part of a pair's
    identity; and with the row's number, from `first` on."""
    count = len(table)
    columns = {
        PLACE[0]: np.full(count, list_number, np.int32),
        PLACE[1]: np.asarray(lines, np.int64),
        NUMBER: np.arange(first, first + count, dtype=np.uint64),
    }
    for name, column in columns.items():
        table = table.append_column(name, pa.array(column))
    return table


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
    digits = uid_bytes(table).hex().encode()
    offsets = np.arange(0, len(digits) + 1, 32, dtype=np.int32)
    uids = pa.StringArray.from_buffers(len(table), pa.py_buffer(offsets), pa.py_buffer(digits))
    return table.set_column(table.column_names.index("uid"), "uid", uids).combine_chunks()
