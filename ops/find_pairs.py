"""Finding the rows of a pair, by its URL or its uid, in all the stages that were named.

What it costs: for a uid the footer of each work order (or sidecar), and the uids of the row groups whose range holds
it; for a URL the URL column of each, some 30 bytes a pair. 16 files are read at a time.
May not live here: what became of the pair (ops/why.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from typing import Any

import numpy as np

from infra.metrics import Tell, untold
from infra.store import Store, absolute, join, open_store
from ops.errors import DamagedArtifact, UsageError
from ops.plan import Instalment, WorkOrder, read_instalments
from ops.recipes import RECIPE, read_json
from ops.shards import Receipt, committed_generations, list_receipts, read_receipts

UID_DIGITS = 8
"""A uid may be cut to so many digits where no other pair's begins alike."""
NEAR_ROWS = 1_000_000
"""Pairs that are looked through for a URL like the one that was not found."""

_UID = re.compile(rf"[0-9a-f]{{{UID_DIGITS},32}}")
_RUN = ("pairs", "tokenizer", "tokens", "model")
_KIND = {"pairs": "pairs", "tokens": "tokens", "tokenizer": "trained", "transformer": "trained"}


@dataclass(frozen=True)
class Stages:
    """What was named, by kind; the stages of a run each on its own."""

    pairs: list[Store]
    tokens: list[Store]
    trained: list[Store]


@dataclass(frozen=True)
class RowsFile:
    """A Parquet file of the rows of one shard: a work order (`plan`), or what a receipt names (`receipt`)."""

    store: Store
    key: str
    shard: int
    rows: int
    plan: tuple[Instalment, WorkOrder] | None = None
    receipt: Receipt | None = None


@dataclass(frozen=True)
class Found:
    """One row of a file, with all its columns, and the receipts of its shard, the oldest first."""

    file: RowsFile
    row: int
    record: dict[str, Any]
    receipts: list[Receipt]

    @property
    def uid(self) -> str:
        """The pair's identity."""
        return str(self.record["uid"])

    @property
    def key(self) -> str:
        """The pair's position: shard and row, as the files of its tar are named."""
        return str(self.record["key"])

    @property
    def is_of_pairs(self) -> bool:
        """Found in PAIRS, not only in codes."""
        return self.file.receipt is None or self.file.receipt.stage == "pairs"


def find_stages(locations: Sequence[str]) -> Stages:
    """The stages that lie at these places, or below them where one is a run, each once. Raises UsageError for none."""
    kinds: dict[str, list[Store]] = {"pairs": [], "tokens": [], "trained": []}
    seen = set()
    for location in locations:
        places = (location, *(join(location, name) for name in _RUN))
        there = [store for store in map(open_store, places) if store.stat(RECIPE) is not None]
        if not there:
            raise UsageError(
                f"{location} holds no stage and no run.",
                "Name a directory of pairs, tokens, a tokenizer or a model, or the run that they lie in.",
            )
        for store in there:
            if absolute(store.location) not in seen:
                seen.add(absolute(store.location))
                kinds[_KIND[read_json(store, RECIPE)["stage"]]].append(store)
    return Stages(**kinds)


def find_pairs(target: str, stages: Stages, limit: int, tell: Tell = untold) -> tuple[list[Found], int]:
    """The rows whose URL is `target`, or whose uid is or begins with it: at most `limit`, and how many there are.

    Rows are looked up as they were planned, committed or not; a shard that no plan names as it was committed. Without
    pairs a uid is looked up in codes. Raises UsageError if there is none, or if several uids begin so.
    """
    uid = target.lower() if _UID.fullmatch(target.lower()) else None
    files = [file for store in stages.pairs for file in _planned(store)]
    if not stages.pairs and uid:
        files = [_committed(store, receipt) for store in stages.tokens for receipt in read_receipts(store).values()]
    places: list[tuple[RowsFile, int]] = []
    with ThreadPoolExecutor(16) as pool:
        look = partial(rows_with, column="uid" if uid else "url", wanted=uid or target, is_prefix=uid is not None)
        for done, (file, rows) in enumerate(zip(files, pool.map(look, files), strict=True), 1):
            places += [(file, row) for row in rows]
            tell("shards searched", done, len(files))
    if not places:
        raise _not_found(target, uid, stages, files)
    found = [
        Found(file, row, read_row(file.store, file.key, row), list_receipts(file.store, file.shard))
        for file, row in places[:limit]
    ]
    uids = sorted({one.uid for one in found})
    if uid and len(uids) > 1:
        raise UsageError(f"{uid} begins the uid of several pairs: {', '.join(uids)}.", "Give more digits.")
    return found, len(places)


def _planned(pairs: Store) -> list[RowsFile]:
    """The work orders, and the sidecars of shards that no plan names."""
    plan = {order.shard: (part, order) for part in read_instalments(pairs) for order in part.work_orders}
    files = [RowsFile(pairs, order.key, order.shard, order.rows, plan=(part, order)) for part, order in plan.values()]
    if committed_generations(pairs).keys() <= plan.keys():
        return files
    return files + [_committed(pairs, receipt) for shard, receipt in read_receipts(pairs).items() if shard not in plan]


def _committed(store: Store, receipt: Receipt) -> RowsFile:
    return RowsFile(store, receipt.files["parquet"].key, receipt.shard, receipt.rows, receipt=receipt)


def rows_with(file: RowsFile, column: str, wanted: str, *, is_prefix: bool = False) -> list[int]:
    """The rows whose text in `column` is, or begins with, `wanted`; of codes those of the first crop."""
    import pyarrow.compute as pc

    rows: list[int] = []
    cut = len(wanted) if is_prefix else None
    for first, group, read in row_groups(file.store, file.key):
        statistics = next(
            (c.statistics for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column), None
        )
        if statistics and statistics.has_min_max and not statistics.min[:cut] <= wanted <= statistics.max[:cut]:
            continue
        values = read([column])[column]
        mask = pc.starts_with(values, wanted) if is_prefix else pc.equal(values, wanted)
        rows += [first + int(row) for row in np.flatnonzero(pc.fill_null(mask, False).to_numpy())]
    if file.receipt and file.receipt.stage == "tokens":
        rows = [row for row in rows if row < file.rows]  # crop 0 comes first: one row a pair
    return rows


def row_groups(store: Store, key: str) -> Iterator[tuple[int, Any, Callable[..., Any]]]:
    """(first row, metadata, read) of each row group. Raises DamagedArtifact for a file that is gone or no Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, root = store.arrow()
    try:
        with filesystem.open_input_file(f"{root}/{key}") as source, pq.ParquetFile(source) as file:
            first = 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                yield first, group, partial(file.read_row_group, number)
                first += group.num_rows
    except FileNotFoundError:
        raise DamagedArtifact(f"{store.location}/{key}", "a Parquet file", "no file") from None
    except pa.ArrowException as error:
        raise DamagedArtifact(f"{store.location}/{key}", "a Parquet file", str(error)) from error


def read_row(store: Store, key: str, row: int) -> dict[str, Any]:
    """One row of a file, all columns: only its row group is read."""
    for first, group, read in row_groups(store, key):
        if first <= row < first + group.num_rows:
            record: dict[str, Any] = read().slice(row - first, 1).to_pylist()[0]
            return record
    raise DamagedArtifact(f"{store.location}/{key}", f"more than {row} rows", "fewer")


def _not_found(target: str, uid: str | None, stages: Stages, files: Sequence[RowsFile]) -> UsageError:
    if not stages.pairs and (not uid or not stages.tokens):
        what = "Codes have no URLs" if stages.tokens else "A trained stage has no pairs"
        return UsageError(f"{target} can't be looked up there.", f"{what}: name the pairs too, with --in PAIRS or RUN.")
    where = ", ".join(store.location for store in stages.pairs or stages.tokens)
    count = sum(file.rows for file in files)
    text = f"{target} is {'the uid' if uid else 'the URL'} of none of {count:,} pairs in {where}."
    if uid:
        return UsageError(text, f"A uid has 32 hex digits, and its first {UID_DIGITS} or more are enough.")
    near = _near_urls(target, files)
    if near:
        return UsageError(text, "Near it are " + " ".join(near))
    hint = f"A uid may be cut to {UID_DIGITS} digits, not to fewer." if re.fullmatch("[0-9a-f]+", target) else ""
    return UsageError(text, hint or "Give the URL as the list has it, before redirects, in quotes; or the uid.")


def _near_urls(url: str, files: Sequence[RowsFile]) -> list[str]:
    """Up to three URLs that begin or end alike: one slip leaves the first or the second half as it is."""
    import pyarrow.compute as pc

    half = len(url) // 2
    near: dict[str, int] = {}
    looked_at = 0
    for file in files:
        if half < 4 or looked_at > NEAR_ROWS:
            break
        looked_at += file.rows
        for _, _, read in row_groups(file.store, file.key):
            urls = read(["url"])["url"]
            alike = pc.or_(pc.starts_with(urls, url[:half]), pc.ends_with(urls, url[half:]))
            for other in urls.filter(alike).to_pylist():
                near[other] = _same_start(url, other) + _same_start(url[::-1], other[::-1])
        near = dict(sorted(near.items(), key=lambda item: (-item[1], item[0]))[:3])
    return list(near)


def _same_start(a: str, b: str) -> int:
    return len(commonprefix([a, b]))  # noqa: RUF071  # characters are meant, not the parts of a path
