"""Lists of generated pictures, their plan, and the promise that every pair is accounted for once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from infra.store import Store
from ops.fetch import FetchSettings
from ops.filters import FilterSettings
from ops.ingest import IngestTask, OutageSettings, pending_tasks, rerun_tasks
from ops.pictures import PictureSettings
from ops.plan import Columns, PlanSettings, extend_plan, pair_uid, read_instalments
from ops.shards import read_receipts, read_table
from ops.verify import verify

Pairs = Sequence[tuple[str, str]]

FETCH = FetchSettings(allow_private=("127.0.0.0/8",), threads=8, deadline_s=5, retries=1, backoff_s=0.01)
PICTURE = PictureSettings(short_side_px=64)
FILTERS = FilterSettings()
OUTAGE = OutageSettings()


def generated(url: str, seeds: range, delay_ms: int = 0) -> list[tuple[str, str]]:
    """One pair for each seed, with a caption that is no other's."""
    query = f"?delay_ms={delay_ms}" if delay_ms else ""
    return [(f"{url}/generated/{seed}.jpg{query}", f"a generated picture, number {seed}") for seed in seeds]


def plan(store: Store, path: Path, pairs: Pairs, pairs_per_shard: int = 10_000) -> None:
    """Writes a TSV list and extends the plan by it."""
    with path.open("w", newline="") as file:
        file.writelines(f"{url}\t{caption}\n" for url, caption in [("url", "caption"), *pairs])
    extend_plan(store, [str(path)], PlanSettings(pairs_per_shard=pairs_per_shard), FILTERS, Columns())


def pending(store: Store, **changed: Any) -> list[IngestTask]:
    """What an ingest of this store would do, with the settings of these tests; `changed` replaces some."""
    settings = {"fetch": FETCH, "picture": PICTURE, "filters": FILTERS, "outage": OUTAGE} | changed
    return pending_tasks(store.location, read_instalments(store), **settings)


def reruns(store: Store, **changed: Any) -> list[IngestTask]:
    """What a rerun of this store would do."""
    settings = {"fetch": FETCH, "picture": PICTURE, "filters": FILTERS, "outage": OUTAGE} | changed
    return rerun_tasks(store.location, **settings)


def rows(store: Store) -> list[dict[str, Any]]:
    """The rows of all sidecars, by shard and row."""
    tables = [read_table(store, receipt) for receipt in read_receipts(store).values()]
    return pa.concat_tables(tables, promote_options="default").to_pylist() if tables else []


def statuses(store: Store) -> dict[str, str]:
    """url -> status."""
    return {row["url"]: row["status"] for row in rows(store)}


def assert_conserved(store: Store, pairs: Pairs) -> None:
    """The multiset of uids on disk is the list, and verify proves each shard to the byte."""
    listed = Counter(pair_uid(url.encode(), caption.encode()).hex() for url, caption in pairs)
    assert Counter(row["uid"] for row in rows(store)) == listed
    report = verify(store, deep=True)
    assert report.problems == ()
    assert report.pairs == len(pairs)
