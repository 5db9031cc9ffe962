"""What lists will give and cost, from a uniform sample of their rows that is really ingested, before anything is spent.

    lists ─ read once ─► `sample` rows, drawn by row number       ─ read again ─► rows with the same URLs as these
          └► hosts                                                      │
    a scratch PAIRS: plan, fetch, filter, store ◄───────────────────────┘ ─► shares, means, each with a 95 % interval

The copies of a sampled URL are planned with it, so that whether a row is a duplicate is decided as in the whole list.
Nothing is left behind. May not live here: how a pair is ingested (ops/ingest.py), how a forecast is shown.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.metrics import Tell, untold
from infra.store import open_store
from ops.errors import UsageError
from ops.fetch import FetchSettings
from ops.filters import FilterSettings
from ops.ingest import IngestTask, OutageSettings, ingest_shard
from ops.lists import Columns, ListPath, Rows, find_lists, fingerprint, read_rows
from ops.pictures import PictureSettings, quiet_cv2
from ops.plan import PlanSettings, WorkOrder, extend_plan, read_work_order
from ops.reasons import SUCCESS, is_transient
from ops.shards import read_receipt, read_table, scratch_directory
from ops.url_duplicates import url_hashes

Z95 = 1.959964
RESAMPLES = 2000
HOSTS_KEPT = 4096
"""Smallest hashes of hosts that are remembered: up to so many hosts are counted, more are estimated (1.6 %)."""
REQUEST_BYTES = 10_000
"""What a request costs of CPU, in bytes of picture: 0.5 ms (INGEST.md §4) against 5 ms for a picture of 100 kB."""
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __mul__(self, factor: float) -> Interval:
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def forecast(
    lists: Sequence[str],
    sample: int,
    seed: int,
    cores: int,
    plan: PlanSettings,
    filters: FilterSettings,
    fetch: FetchSettings,
    picture: PictureSettings,
    outage: OutageSettings,
    columns: Columns,
    tell: Tell = untold,
) -> dict[str, Any]:
    """The forecast as plain numbers (`--json`). Raises UsageError, BadList, StorageError.

    `yield`, `reasons` and `languages` are shares of rows (Wilson's interval, narrower where the sample is a large part
    of the list); bytes and CPU-hours are for the whole list (percentile bootstrap of the mean of a row, since sizes are
    skewed); `hours` are CPU-hours over `cores`, which holds while the network and the sites keep up. `bytes_in` are
    those of files that arrived. `hosts` is counted over the whole list, and each is asked for robots.txt.
    """
    if sample < 1 or cores < 1:
        raise UsageError(f"--sample {sample} --cores {cores}: both are at least 1.", "For example --sample 500")
    if not lists:
        raise UsageError("no list was given.", "Name at least one list file or folder: armchair forecast LIST")
    began_s = time.monotonic()
    with scratch_directory() as scratch:
        source = _Source(_distinct(lists), columns, filters.caption_required, scratch, tell)
        drawn = _draw(source, sample, seed)
        location = str(scratch / "pairs")
        part = str(_with_copies(source, drawn, scratch / "sample.parquet", plan.unique_urls))
        one_shard = PlanSettings(pairs_per_shard=1_000_000, held_out=plan.held_out, unique_urls=plan.unique_urls)
        planned = extend_plan(open_store(location), [part], one_shard, filters, Columns()).instalment
        assert planned is not None
        quiet_cv2()  # imported before the clock starts: a run does that once a worker
        tell("pairs of the sample", 0, len(drawn.rows))
        cpu_s, wall_s, seen = -time.process_time(), -time.monotonic(), []
        for order in planned.work_orders:
            task = IngestTask(location, order, fetch, picture, filters, outage, accept_partial=True)
            ingest_shard(task)
            seen.append(_Seen.read(location, order))
        cpu_s += time.process_time()
        wall_s += time.monotonic()
        tell("pairs of the sample", len(drawn.rows), len(drawn.rows))
    everything = _Seen(*(np.concatenate([getattr(one, f.name) for one in seen]) for f in fields(_Seen)))
    of_list = Scale(drawn.count, len(drawn.rows), np.random.default_rng([seed, 1]))
    cost = np.where(everything.is_asked, everything.bytes_in + REQUEST_BYTES, 0.0)
    cpu_s_of_row = cost * (cpu_s / max(cost.sum(), 1.0))
    of_sample = everything.is_sampled
    statuses = everything.status[of_sample]
    languages = everything.language[of_sample]
    told = sum(language is not None for language in languages)
    cpu_hours = of_list.total(cpu_s_of_row[of_sample]) * (1 / 3600)
    hosts = drawn.hosts.count()
    return {
        "rows": drawn.count,
        "sample": len(drawn.rows),
        "seed": seed,
        "yield": _plain(kept := of_list.share(int((statuses == SUCCESS).sum()))),
        "pairs": _plain(kept * drawn.count),
        "reasons": {reason: _plain(of_list.share(n)) for reason, n in _counts(statuses) if reason != SUCCESS},
        "transient": round(float(np.mean([is_transient(status) for status in statuses])), 6),
        "languages": {
            language: _plain(of_list.share(n, told)) for language, n in _counts(languages) if language is not None
        },
        "bytes_in": _plain(of_list.total(everything.bytes_in[of_sample])),
        "bytes_stored": _plain(of_list.total(everything.stored[of_sample])),
        "short_side_px": picture.short_side_px,
        "cpu_hours": _plain(cpu_hours),
        "cores": cores,
        "hours": _plain(cpu_hours * (1 / cores)),
        "hosts": _plain(hosts),
        "robots_requests": _plain(hosts if fetch.robots else hosts * 0),
        "measured": {"cpu_s": round(cpu_s, 3), "wall_s": round(wall_s, 3)},
        "seconds": round(time.monotonic() - began_s, 3),
    }


def _plain(interval: Interval) -> dict[str, float]:
    return {name: round(value, 6) for name, value in asdict(interval).items()}


def _counts(values: Array) -> list[tuple[Any, int]]:
    """The most frequent first, equal ones by name."""
    return sorted(Counter(values.tolist()).items(), key=lambda one: (-one[1], str(one[0])))


def wilson(count: float, of: float) -> Interval:
    """A share and Wilson's score interval for it.

    >>> found = wilson(70, 100)
    >>> round(found.low, 3), found.value, round(found.high, 3)
    (0.604, 0.7, 0.781)
    """
    share, z2 = count / of, Z95 * Z95 / of
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(share * (1 - share) / of + z2 / (4 * of))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(values: Array, generator: np.random.Generator) -> Interval:
    """A mean and its percentile bootstrap interval."""
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Scale:
    """From a sample without replacement to the list: what was drawn of a small list is known, not estimated."""

    rows: int
    sample: int
    generator: np.random.Generator

    def share(self, count: int, of: int | None = None) -> Interval:
        """Of `of` sampled rows (all of them, unless given) `count` have a property."""
        of = self.sample if of is None else of
        left = self.rows - self.sample
        if left == 0:
            return Interval(count / of, count / of, count / of)
        # The variance shrinks by left / (rows - 1): as if more had been drawn.
        effective = of * (self.rows - 1) / left
        found = wilson(count / of * effective, effective)
        # What was seen is there: at least so many of all rows.
        return Interval(found.value, max(found.low, count / self.rows), found.high)

    def total(self, values: Array) -> Interval:
        """The sum over the list, of what each sampled row has."""
        found = bootstrap(values, self.generator)
        shrink = math.sqrt((self.rows - self.sample) / max(1, self.rows - 1))
        low, high = (found.value + (edge - found.value) * shrink for edge in (found.low, found.high))
        return Interval(found.value, low, high) * self.rows


@dataclass
class Hosts:
    """How many different sites there are, in little memory: the smallest hashes tell how dense all of them lie."""

    smallest: Array = field(default_factory=lambda: np.zeros(0, np.uint64))

    def add(self, urls: Sequence[bytes | None]) -> None:
        """Takes the sites (scheme, host, port) of these URLs; what is no http URL has none."""
        site = pc.extract_regex(pa.array(urls, pa.binary()), r"^[ \t]*(?P<site>(?i:https?://)[^/?#\\ ]+)")
        sites = pc.struct_field(site, "site").unique().drop_null()
        hashes = url_hashes(site.lower() for site in sites.to_pylist())
        self.smallest = np.unique(np.concatenate([self.smallest, hashes]))[:HOSTS_KEPT]

    def count(self) -> Interval:
        """Exact while all hashes are remembered; beyond, the estimate of the k smallest values and its error."""
        k = len(self.smallest)
        if k < HOSTS_KEPT:
            return Interval(k, k, k)
        value = (k - 1) / ((float(self.smallest[-1]) + 1) / 2.0**64)
        half = Z95 * value / math.sqrt(k - 2)
        return Interval(round(value), round(value - half), round(value + half))


@dataclass(frozen=True)
class _Source:
    """The rows of the lists, as often as they are wanted."""

    paths: list[ListPath]
    columns: Columns
    caption_required: bool
    scratch: Path
    tell: Tell

    def batches(self, what: str) -> Iterator[tuple[int, Rows]]:
        """Number of the first row, from 0, and the rows."""
        first = 0
        for path in self.paths:
            for rows in read_rows(path, self.columns, caption_required=self.caption_required, scratch=self.scratch):
                yield first, rows
                first += len(rows.urls)
                self.tell(what, first, None)


def _distinct(lists: Sequence[str]) -> list[ListPath]:
    """The lists in the order of their digests, equal bytes once: as the plan takes them."""
    paths, _ = find_lists(lists)
    return [path for _, path in sorted({fingerprint(path.path)[0]: path for path in paths}.items())]


@dataclass(frozen=True)
class _Drawn:
    """The sampled rows by their numbers, how many rows there are, and their sites."""

    rows: dict[int, tuple[bytes | None, bytes | None]]
    count: int
    hosts: Hosts


def _draw(source: _Source, sample: int, seed: int) -> _Drawn:
    """A reservoir: every row gets a random number, the rows with the smallest ones stay."""
    generator, hosts = np.random.default_rng(seed), Hosts()
    stay: list[tuple[float, int, bytes | None, bytes | None]] = []
    limit, count = 1.0, 0
    for first, rows in source.batches("rows read"):
        keys = generator.random(len(rows.urls))
        for row in np.flatnonzero(keys <= limit).tolist():
            stay.append((float(keys[row]), first + row, rows.urls[row], rows.captions[row]))
        if len(stay) > sample:
            stay = sorted(stay, key=lambda one: one[:2])[:sample]
            limit = stay[-1][0]
        hosts.add(rows.urls)
        count += len(rows.urls)
    return _Drawn({number: (url, caption) for _, number, url, caption in stay}, count, hosts)


def _with_copies(source: _Source, drawn: _Drawn, path: Path, unique_urls: bool) -> Path:
    """A list of the sampled rows and of all others with the same URLs, in the order of the lists."""
    numbers, urls, captions, is_sampled = [], [], [], []
    wanted = url_hashes(url for url, _ in drawn.rows.values() if url)
    for first, rows in source.batches("rows compared") if unique_urls else ():
        found = np.flatnonzero(np.isin(url_hashes(url or b"" for url in rows.urls), wanted))
        for row in found.tolist():
            if first + row not in drawn.rows:
                numbers.append(first + row)
                urls.append(rows.urls[row])
                captions.append(rows.captions[row])
                is_sampled.append(False)
    for number, (url, caption) in drawn.rows.items():
        numbers.append(number)
        urls.append(url)
        captions.append(caption)
        is_sampled.append(True)
    columns = (pa.array(urls, pa.binary()), pa.array(captions, pa.binary()), pa.array(is_sampled))
    table = pa.table(dict(zip(("url", "caption", "is_sampled"), columns, strict=True)))
    pq.write_table(table.take(np.argsort(numbers, kind="stable")), path)
    return path


@dataclass(frozen=True)
class _Seen:
    """The sidecar's rows of the sample and its copies, one entry a row."""

    is_sampled: Array
    status: Array
    language: Array
    is_asked: Array
    bytes_in: Array
    stored: Array

    @classmethod
    def read(cls, location: str, order: WorkOrder) -> _Seen:
        """Of a committed shard. A kept row stores its JPEG and its share of the tar's frame, each row a sidecar's."""
        store = open_store(location)
        receipt = read_receipt(store, order.shard, 0)
        table = read_table(store, receipt)
        status = np.array(table["status"].to_pylist(), object)
        jpeg = _numbers(table["jpg_size"])
        frame = (receipt.files["tar"].bytes - jpeg.sum()) / max(receipt.kept, 1)
        stored = receipt.files["parquet"].bytes / len(table) + np.where(status == SUCCESS, jpeg + frame, 0.0)
        return cls(
            table["is_sampled"].to_numpy(),
            status,
            np.array(table["language"].to_pylist(), object),
            read_work_order(store, order)["status"].is_null().to_numpy(),
            _numbers(table["bytes_in"]),
            stored,
        )


def _numbers(column: pa.ChunkedArray) -> Array:
    numbers: Array = column.cast(pa.float64()).fill_null(0.0).to_numpy()
    return numbers
