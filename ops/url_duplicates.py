"""URLs that are listed more than once: of the rows that would ask for one URL only the first is left to ask for it.

    add        hash, uid and number of each row that is to be fetched: 24 bytes a row, on scratch
    find       a bucket of hashes at a time: which rows are the first, and which URLs were planned before
    UrlIndex   the hashes that an instalment leaves to be fetched, for all later ones: 8 bytes a URL, ascending

The first is the one with the smallest uid (the order of the plan), and of equal uids the one that was listed first:
names, the order of lists and the number of buckets decide nothing. Memory is a bucket, and one bit a row.

A URL is known by 64 bits of blake2b. Of n different ones n² / 2^65 are expected to be taken for another and lost: 0.002
of 250 million, 0.7 of five thousand million. 128 bits would double what every later instalment reads.
May not live here: which rows are to be fetched, and what becomes of the others (ops/plan.py).
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infra.metrics import Tell, untold
from infra.store import Store
from ops.errors import DamagedArtifact

Numbers = np.ndarray[Any, np.dtype[np.uint64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Bucket = tuple[Numbers, Numbers, Numbers, Flags]

U64 = np.dtype("<u8")
BLOCK_ROWS = 1 << 19
"""Rows that are sorted and written to scratch at a time: 12 MB."""
BUCKET_ROWS = 1 << 20
"""Rows of a bucket, three hashes of earlier instalments counted as one: 24 MB, some 100 MB while it is sorted."""
FINEST = 4096
"""Buckets, at most: where each begins is kept for every block."""
READ_BYTES = 64 << 20
"""What is read ahead of all earlier indexes together."""


@dataclass(frozen=True)
class UrlIndex:
    """A file of the store: the hashes of the URLs that an instalment leaves to be fetched, each once, as ascending
    little-endian u64."""

    key: str
    urls: int
    sha256: str


def url_hashes(urls: Iterable[bytes]) -> Numbers:
    """What each URL is known by: blake2b over its raw bytes, 8 bytes of it as a little-endian number.

    >>> url_hashes([b"http://a/1.jpg"]).tolist()
    [10655252462591060796]
    """
    return np.frombuffer(b"".join([hashlib.blake2b(url, digest_size=8).digest() for url in urls]), U64)


class LostRows:
    """Numbers of rows, one bit each."""

    def __init__(self, rows: int) -> None:
        self._bits = np.zeros(-(-rows // 8), np.uint8)

    def add(self, numbers: Numbers) -> None:
        """Takes these rows."""
        np.bitwise_or.at(self._bits, numbers >> 3, (1 << (numbers & 7)).astype(np.uint8))

    def has(self, numbers: Numbers) -> Flags:
        """Which of these rows were added."""
        bits = self._bits[numbers >> 3] >> (numbers & 7).astype(np.uint8)
        found: Flags = (bits & 1).astype(np.bool_)
        return found


class UrlDuplicates:
    """The rows of one instalment that are to be fetched: first all are added, then `find` is called once."""

    def __init__(self, scratch: Path) -> None:
        self._file = (scratch / "urls.u64").open("w+b")
        self._waiting: list[Numbers] = []
        self._edges: list[list[int]] = []
        """Of each block on scratch the rows before each of the finest buckets, and all."""
        self.rows = 0

    def __enter__(self) -> UrlDuplicates:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, hashes: Numbers, uids: Numbers, numbers: Numbers) -> None:
        """Takes rows: of each the hash of its URL, the first half of its uid, and its number, which only grows."""
        self._waiting.append(np.stack([hashes, uids, numbers]))
        self.rows += len(hashes)
        if sum(block.shape[1] for block in self._waiting) >= BLOCK_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        block = np.concatenate(self._waiting, axis=1)
        self._waiting = []
        block = block[:, np.argsort(block[0])]
        edges = np.arange(1, FINEST, dtype=np.uint64) * np.uint64(2**64 // FINEST)
        self._edges.append([0, *np.searchsorted(block[0], edges).tolist(), block.shape[1]])
        block.astype(U64).tofile(self._file)

    def find(
        self, store: Store, earlier: Sequence[UrlIndex], rows: int, index: Path, tell: Tell = untold
    ) -> tuple[LostRows, int]:
        """Which of all `rows` lost their URL to another row or to an `earlier` instalment. The hashes of the URLs that
        are left are written to `index`; how many these are is returned too.

        One task a bucket where a Ray is connected, else here: the same bytes. Raises DamagedArtifact.
        """
        self._flush()
        size = self.rows + sum(one.urls for one in earlier) // 3
        buckets = min(FINEST, 1 << (size // BUCKET_ROWS).bit_length())
        before = [_Earlier(store, one, READ_BYTES // len(earlier)) for one in earlier]
        lost, left, compared = LostRows(rows), 0, 0
        with index.open("wb") as file:
            for gone, stay in _spread((self._bucket(n, buckets, before) for n in range(buckets)), buckets):
                lost.add(gone)
                stay.tofile(file)
                left += len(stay)
                compared += len(gone) + len(stay)
                tell("URLs compared", compared, self.rows)
        return lost, left

    def _bucket(self, number: int, buckets: int, before: Sequence[_Earlier]) -> Bucket:
        """Hashes, uids and numbers of the rows of a bucket, and whether an earlier instalment has the URL."""
        low, high = (FINEST // buckets * n for n in (number, number + 1))
        parts, start = [np.empty((3, 0), U64)], 0
        for edges in self._edges:
            first, count = edges[low], edges[high] - edges[low]
            columns = []
            for column in range(3):
                self._file.seek(U64.itemsize * (start + column * edges[-1] + first))
                columns.append(np.fromfile(self._file, U64, count))
            parts.append(np.stack(columns))
            start += 3 * edges[-1]
        hashes, uids, numbers = np.concatenate(parts, axis=1)
        theirs = np.concatenate([np.empty(0, U64), *(one.below(high * (2**64 // FINEST)) for one in before)])
        if len(before) > 1:
            theirs.sort()
        if not len(theirs):
            return hashes, uids, numbers, np.zeros(len(hashes), bool)
        found = theirs[np.minimum(np.searchsorted(theirs, hashes), len(theirs) - 1)]
        return hashes, uids, numbers, found == hashes


def first_of_each(bucket: Bucket) -> tuple[Numbers, Numbers]:
    """The numbers of the rows that lose their URL, and the hashes of the URLs that are left, ascending."""
    hashes, uids, numbers, known = bucket
    order = np.lexsort((numbers, uids, hashes))
    hashes = hashes[order]
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = hashes[1:] != hashes[:-1]
    stays = is_first & ~known[order]
    return numbers[order][~stays], hashes[stays]


def check_index(store: Store, index: UrlIndex, *, deep: bool) -> str | None:
    """What is wrong with the file of an index, or None; `deep` reads it."""
    entry, size = store.stat(index.key), U64.itemsize * index.urls
    if entry is None:
        return f"{index.key} is missing"
    if entry.bytes != size:
        return f"{index.key} has {entry.bytes} bytes, its instalment says {size}"
    try:
        if deep:
            reader = _Earlier(store, index, READ_BYTES)
            for part in range(256):
                reader.below((part + 1) << 56)
    except DamagedArtifact as error:
        return str(error)
    return None


def _spread(buckets: Iterator[Bucket], count: int) -> Iterator[tuple[Numbers, Numbers]]:
    """`first_of_each` of all buckets, in their order."""
    ray = sys.modules.get("ray")
    if count == 1 or ray is None or not ray.is_initialized():
        yield from map(first_of_each, buckets)
        return
    remote = ray.remote(first_of_each).options(name="URLs of one bucket")
    window = 2 * int(ray.cluster_resources().get("CPU", 1))
    in_flight: deque[Any] = deque()
    for bucket in buckets:
        in_flight.append(remote.remote(bucket))
        if len(in_flight) == window:
            yield ray.get(in_flight.popleft())
    while in_flight:
        yield ray.get(in_flight.popleft())


class _Earlier:
    """The index of an earlier instalment, read once from its beginning to its end, and checked when it is there."""

    def __init__(self, store: Store, index: UrlIndex, read_bytes: int) -> None:
        self._store, self._index = store, index
        self._piece = min(8 << 20, max(read_bytes, 64 << 10)) // U64.itemsize * U64.itemsize
        self._digest, self._at, self._end = hashlib.sha256(), 0, U64.itemsize * index.urls
        self._left: Numbers = np.empty(0, U64)

    def below(self, edge: int) -> Numbers:
        """The hashes below `edge` that were not given before. Raises DamagedArtifact."""
        parts = [self._left]
        while self._at < self._end and not (len(parts[-1]) and int(parts[-1][-1]) >= edge):
            parts.append(np.frombuffer(self._next_piece(), U64))
        hashes = np.concatenate(parts)
        stop = len(hashes) if edge == 2**64 else int(np.searchsorted(hashes, np.uint64(edge)))
        self._left = hashes[stop:].copy()
        return hashes[:stop]

    def _next_piece(self) -> bytes:
        place, wanted = f"{self._store.location}/{self._index.key}", min(self._piece, self._end - self._at)
        try:
            data = self._store.read_range(self._index.key, self._at, wanted)
        except FileNotFoundError:
            raise DamagedArtifact(place, f"{self._end} bytes", "no file") from None
        self._digest.update(data)
        self._at += len(data)
        if len(data) < wanted:
            raise DamagedArtifact(place, f"{self._end} bytes", f"{self._at} bytes")
        if self._at == self._end and self._digest.hexdigest() != self._index.sha256:
            raise DamagedArtifact(place, f"sha256 {self._index.sha256}", f"sha256 {self._digest.hexdigest()}")
        return data
