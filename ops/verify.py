"""The proof of conservation: every planned pair of a committed shard is accounted for once, and (deep) every byte.

Without `deep`: receipts against the plan, and that their files are there with the recorded size; seconds for thousands
of shards. With `deep` each data file is read: digests, rows against the work order, members of the tar against rows.
Nothing is repaired here, and a shard that is not committed is no problem: the next command does it.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.metrics import Tell, untold
from infra.store import Store
from ops.drops import list_drops, read_drop_list
from ops.errors import DamagedArtifact, UsageError
from ops.plan import Instalment, WorkOrder, read_instalments, read_work_order
from ops.reasons import SUCCESS
from ops.shards import Receipt, committed_generations, download, read_receipt, scratch_directory, tar_members
from ops.url_duplicates import check_index


@dataclass(frozen=True)
class Problem:
    """What is wrong, and with which shard (None: with the plan or a drop list)."""

    shard: int | None
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """`pairs` are the rows of the committed shards that were looked at; `shards` how many these are."""

    pairs: int
    shards: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Nothing lost, nothing doubled, nothing counted that is not on disk."""
        return not self.problems


def verify(store: Store, *, deep: bool = False, tell: Tell = untold) -> VerifyReport:
    """Checks a directory of pair shards or of token shards. Raises UnknownFormat for one of a later version.

    Raises UsageError where there is neither a plan nor a shard: no promise was looked at.
    """
    problems: list[Problem] = []
    instalments: list[Instalment] = []
    try:
        instalments = read_instalments(store)
    except DamagedArtifact as error:
        problems.append(Problem(None, str(error)))
    orders = {order.shard: order for instalment in instalments for order in instalment.work_orders}
    plan_is_whole = not problems
    indexes = [instalment.urls for instalment in instalments if instalment.urls]
    problems += [Problem(None, what) for index in indexes if (what := check_index(store, index, deep=deep))]
    for key in list_drops(store):
        try:
            read_drop_list(store, key)
        except DamagedArtifact as error:
            problems.append(Problem(None, str(error)))
    committed = committed_generations(store)
    if plan_is_whole and not instalments and not committed:
        raise UsageError(
            f"{store.location}: there is nothing to verify.",
            "Name a directory that `armchair ingest` or `armchair tokenize` made.",
        )
    pairs, shards, bytes = 0, 0, 0
    for shard, generation in sorted(committed.items()):
        try:
            receipt = read_receipt(store, shard, generation)
        except DamagedArtifact as error:
            problems.append(Problem(shard, str(error)))
            continue
        pairs += receipt.rows
        shards += 1
        bytes += sum(ref.bytes for ref in receipt.files.values()) if deep else 0
        found = list(_check_receipt(store, receipt, shard, generation))
        if receipt.stage == "pairs" and plan_is_whole:
            found += _check_plan(receipt, orders.get(shard))
        if deep and not found:
            found = list(_check_bytes(store, receipt, orders.get(shard)))
        problems += [Problem(shard, what) for what in found]
        tell("shards", shards, len(committed))
        if deep:
            tell("bytes", bytes, None)
    return VerifyReport(pairs, shards, tuple(problems))


def _check_receipt(store: Store, receipt: Receipt, shard: int, generation: int) -> Iterator[str]:
    if (receipt.shard, receipt.generation) != (shard, generation):
        yield f"its receipt says shard {receipt.shard} g{receipt.generation}, its name {shard} g{generation}"
    if receipt.kept + sum(receipt.rejected.values()) != receipt.rows:
        yield f"{receipt.rows} rows, but {receipt.kept} kept + {sum(receipt.rejected.values())} rejected"
    for ref in receipt.files.values():
        entry = store.stat(ref.key)
        if entry is None:
            yield f"{ref.key} is missing"
        elif entry.bytes != ref.bytes:
            yield f"{ref.key} has {entry.bytes} bytes, its receipt says {ref.bytes}"


def _check_plan(receipt: Receipt, order: WorkOrder | None) -> Iterator[str]:
    if order is None:
        yield "no instalment names this shard"
    elif (receipt.rows, receipt.made_from.get("work_order")) != (order.rows, order.sha256):
        yield (
            f"made from {receipt.rows} rows of work order {receipt.made_from.get('work_order')}, planned are "
            f"{order.rows} rows of {order.sha256}"
        )


def _check_bytes(store: Store, receipt: Receipt, order: WorkOrder | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with scratch_directory() as scratch:
        files = {extension: scratch / f"shard.{extension}" for extension in receipt.files}
        try:
            for extension, path in files.items():
                download(store, receipt.files[extension], path)
            planned = read_work_order(store, order) if order else None
            with pq.ParquetFile(files["parquet"]) as file:
                groups = tuple(filter(None, (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))))
                table = file.read()
        except (DamagedArtifact, pa.ArrowException, KeyError) as error:
            yield str(error)
            return
        if groups != receipt.row_groups:
            yield f"row groups of {groups} rows, its receipt says {receipt.row_groups}"
        if receipt.stage == "tokens":
            yield from _check_codes(receipt, table)
        elif planned is not None:
            yield from _check_rows(receipt, table, planned)
            yield from _check_tar(files["tar"], table)


def _check_rows(receipt: Receipt, table: Any, planned: Any) -> Iterator[str]:
    """The sidecar against its work order: each planned pair once, in its place, and counted under its status."""
    for name in ("key", "uid", "url", "caption", "split", "weight"):
        was, now = planned[name].to_pylist(), table[name].to_pylist()
        if was != now:
            row = next(
                (i for i, pair in enumerate(zip(was, now, strict=False)) if pair[0] != pair[1]), min(len(was), len(now))
            )
            yield f"{name} differs from the work order, first in row {row}"
    counts = Counter(table["status"].to_pylist())
    kept = counts.pop(SUCCESS, 0)
    if (kept, dict(counts)) != (receipt.kept, receipt.rejected):
        yield f"its rows say {kept} kept and {dict(counts)}, its receipt {receipt.kept} and {receipt.rejected}"
    if any(
        verdict not in (None, status)
        for verdict, status in zip(planned["status"].to_pylist(), table["status"].to_pylist(), strict=False)
    ):
        yield "a row that the plan rejected has another status now"


def _check_tar(path: Path, table: Any) -> Iterator[str]:
    """The tar against the sidecar: exactly the kept pairs, in order, each picture where its row says."""
    rows = table.select(["key", "uid", "caption", "status", "tar_offset", "jpg_size"]).to_pylist()
    kept = [row for row in rows if row["status"] == SUCCESS]
    expected = [f"{row['key']}.{extension}" for row in kept for extension in ("jpg", "json", "txt")]
    try:
        members = list(tar_members(path))
    except tarfile.TarError as error:
        yield f"the tar can't be read: {error}"
        return
    if [name for name, _, _ in members] != expected:
        yield f"the tar holds {len(members)} files, the sidecar's {len(kept)} kept pairs need {len(expected)}, in order"
        return
    with path.open("rb") as file:
        for i, row in enumerate(kept):
            (_, at, size), described, text = members[3 * i : 3 * i + 3]
            if (at, size) != (row["tar_offset"], row["jpg_size"]):
                said = (row["tar_offset"], row["jpg_size"])
                yield f"{row['key']}.jpg lies at {at} with {size} bytes, its row says {said}"
            bodies = []
            for _, start, length in ((None, at, size), described, text):
                file.seek(start)
                bodies.append(file.read(length))
            if not bodies[0].startswith(b"\xff\xd8"):
                yield f"{row['key']}.jpg is no JPEG"
            if json.loads(bodies[1])["uid"] != row["uid"]:
                yield f"{row['key']}.json is of another pair"
            if bodies[2] != (row["caption"] or "").encode():
                yield f"{row['key']}.txt is not the caption"


def _check_codes(receipt: Receipt, table: Any) -> Iterator[str]:
    """A token shard: in each row group one crop number k, and for each k the same pictures, each once a place."""
    if table["codes"].null_count:
        yield f"{table['codes'].null_count} rows have no codes"
    uids_of: dict[int, list[str]] = {}
    first = 0
    for rows in receipt.row_groups:
        part = table.slice(first, rows)
        crops = set(part["k"].to_pylist())
        if len(crops) != 1:
            yield f"the row group at row {first} mixes crops {sorted(crops)}"
            return
        uids_of.setdefault(crops.pop(), []).extend(part["uid"].to_pylist())
        first += rows
    if len({tuple(uids) for uids in uids_of.values()}) > 1:
        yield "its crops are not of the same pictures"
    if any(len(uids) != receipt.kept for uids in uids_of.values()):
        yield f"{sorted(len(uids) for uids in uids_of.values())} pictures a crop, its receipt says {receipt.kept}"
