"""What `armchair status` counts of each receipt, in one file: thousands of receipts are not read again for a look.

    index/receipts.json     derived, sealed, replaced as a whole; delete it, or let a sweep delete it, whenever you like

It is never believed over the receipts: one counts only if the listing of receipts shows the same name, size and time.
A file that is torn, of another version, or of a store that was copied, is as good as none, and of two writers
at once either may win. May not live here: anything that decides what is done or proves it (ingest, verify, readers).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from infra.store import Entry, Store
from ops.errors import ArmchairError
from ops.recipes import parse_sealed, seal
from ops.shards import Receipt, parse_receipt_key, read_receipt

INDEX = "index/receipts.json"
FORMAT = 1
WORTH = 500
"""The index is written when so many receipts were read that it did not hold: reading these again is a moment's work."""


class Summary(NamedTuple):
    """What is counted of one receipt, and the name, size and time under which it was listed when it was read.

    `digest` is the receipt's, `made_from` that of the pair receipt which a token shard was made from.
    """

    key: str
    listed_bytes: int
    listed_s: float
    shard: int
    generation: int
    rows: int
    kept: int
    rejected: dict[str, int]
    bytes: int
    digest: str
    made_from: str

    @classmethod
    def of(cls, receipt: Receipt, entry: Entry) -> Summary:
        """The summary of a receipt that was listed as `entry`."""
        bytes = sum(ref.bytes for ref in receipt.files.values())
        counted = receipt.rows, receipt.kept, receipt.rejected, bytes
        place = entry.key, entry.bytes, entry.modified_s, receipt.shard, receipt.generation
        return cls(*place, *counted, receipt.digest, receipt.made_from.get("pairs", ""))

    def is_of(self, entry: Entry) -> bool:
        """Whether this entry of a listing is the receipt that was read."""
        return (self.key, self.listed_bytes, self.listed_s) == (entry.key, entry.bytes, entry.modified_s)


class ReceiptIndex:
    """The summaries of one store's receipts. Looking again lists, and reads what is new."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, Summary] | None = None
        self._unwritten = 0

    def look(self) -> dict[int, Summary]:
        """Shard -> the summary of its receipt of the highest generation, in the order of shards."""
        highest: dict[int, tuple[int, Entry]] = {}
        for entry in self._store.list("receipts/"):
            if (at := parse_receipt_key(entry.key)) and at[1] >= highest.get(at[0], (0, entry))[0]:
                highest[at[0]] = at[1], entry
        if self._known is None:
            self._known = {summary.key: summary for summary in _read_index(self._store)} if highest else {}
        new = [(shard, *at) for shard, at in highest.items() if not self._is_known(at[1])]
        if new:
            with ThreadPoolExecutor(16) as pool:  # a bucket answers one read in tens of milliseconds
                for summary in pool.map(self._read, new):
                    self._known[summary.key] = summary
        found = {shard: self._known[highest[shard][1].key] for shard in sorted(highest)}
        self._unwritten += len(new)
        if self._unwritten >= WORTH:
            self._unwritten = 0
            _write_index(self._store, found.values())
        return found

    def _is_known(self, entry: Entry) -> bool:
        known = self._known.get(entry.key) if self._known else None
        return known is not None and known.is_of(entry)

    def _read(self, at: tuple[int, int, Entry]) -> Summary:
        shard, generation, entry = at
        return Summary.of(read_receipt(self._store, shard, generation), entry)


def _read_index(store: Store) -> list[Summary]:
    try:
        rows = parse_sealed(store.read(INDEX), INDEX, FORMAT)["receipts"]
        return [Summary(*row) for row in rows]
    except (OSError, ArmchairError, KeyError, TypeError):
        return []


def _write_index(store: Store, summaries: Iterable[Summary]) -> None:
    data = seal({"format": FORMAT, "receipts": list(summaries)})
    with contextlib.suppress(OSError):  # who may only read sees the same numbers, later
        store.put(INDEX, data, if_absent=False)
