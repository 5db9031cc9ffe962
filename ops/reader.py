"""Reading pinned shards in a training order: the cursor is one number, the position.

`Order` maps a position to (epoch, group, row) without state: the groups of a snapshot are permuted by (seed, epoch);
each run of W groups in that order is a window, whose rows are permuted together. So the order is the same for any
number of workers, a resume starts anywhere, and memory is 2 W groups (the
next window is read ahead). Positions never shift: a row that is thinned out
by its `weight` or taken down by a drop list is a hole. May not live here: pixels, tokens, tensors.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from infra.store import Store
from ops.drops import Drops, Flags, read_drops
from ops.errors import DamagedArtifact, StorageError
from ops.seeds import derived_seed, derived_share
from ops.shards import FileRef, read_verified
from ops.snapshot import HELD_OUT, TRAIN, Group, Kind, PinnedShard, Snapshot, selection

Codes = np.ndarray[Any, np.dtype[np.uint16]]
Indices = np.ndarray[Any, np.dtype[np.int64]]
T = TypeVar("T")

JPEG_START = b"\xff\xd8"
WINDOW_GROUPS: dict[Kind, int] = {"pictures": 16, "codes": 64}
"""Groups whose rows are permuted together in training, W: those of two windows are in memory."""
LOADERS = 4
"""Groups that are read at once: a bucket answers in tens of milliseconds, and a group takes some requests."""
GAP_BYTES = 256 << 10
"""So many bytes that nobody asked for are read along: a bucket sends them in the time that it takes to answer."""
SHARE_OF = 6
"""A larger share of a batch than a sixth saves nothing: so many pictures of 50 kB are GAP_BYTES."""

_CROP = Group._fields.index("crop")
_SPLITS = {split: Group._fields.index(split) for split in (TRAIN, HELD_OUT)}


@dataclass(frozen=True)
class Place:
    """Where a position lies: `row` counts the selected rows of `group`, `group` those of one epoch."""

    epoch: int
    group: int
    row: int


class Window(NamedTuple):
    """Positions `start` … `stop` - 1: all rows of `groups`, which are permuted together."""

    epoch: int
    number: int
    start: int
    stop: int
    groups: Indices


class Order:
    """A stateless shuffle of rows that come in groups: every row exactly once an epoch, in windows of W groups.

    >>> order = Order([3, 2], seed=0, window_groups=2)
    >>> sorted((p.group, p.row) for p in map(order.at, range(5, 10)))
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    """

    def __init__(self, sizes: Sequence[int] | Indices, seed: int, window_groups: int) -> None:
        """`sizes` are the selected rows of each group. Raises ValueError if there is none."""
        self._sizes = np.asarray(sizes, np.int64)
        self.rows = int(self._sizes.sum())
        if not self.rows:
            raise ValueError("an order over no rows")
        self._seed, self._window_groups = seed, window_groups
        # A lookup is pure, these only make it cheap. Two epochs and two windows: a reader looks one window ahead.
        self._groups_of = lru_cache(maxsize=2)(self._make_groups)
        self._rows_of = lru_cache(maxsize=2)(self._make_rows)

    def at(self, position: int) -> Place:
        """The place of a position (0, 1, … without end)."""
        window = self.window(position)
        groups, rows = self.places(window, position, position + 1)
        return Place(window.epoch, int(groups[0]), int(rows[0]))

    def window(self, position: int) -> Window:
        """The window that a position lies in."""
        epoch, within = divmod(position, self.rows)
        groups, firsts = self._groups_of(epoch)
        number = int(np.searchsorted(firsts, within, side="right")) - 1
        start, stop = (epoch * self.rows + int(first) for first in firsts[number : number + 2])
        return Window(epoch, number, start, stop, self._members(groups, number))

    def places(self, window: Window, start: int, stop: int) -> tuple[Indices, Indices]:
        """(group, row) at each of the positions `start` … `stop` - 1, which lie in `window`."""
        rows, ends = self._rows_of(window.epoch, window.number)
        rows = rows[start - window.start : stop - window.start]
        members = np.searchsorted(ends, rows, side="right")
        return window.groups[members], rows - (ends - self._sizes[window.groups])[members]

    def position(self, place: Place) -> int:
        """The position of a place, which `at` leads back to: one permutation of groups and one of a window's rows.

        >>> order = Order([3, 2], seed=0, window_groups=2)
        >>> order.at(order.position(Place(7, 1, 0)))
        Place(epoch=7, group=1, row=0)
        """
        groups, firsts = self._groups_of(place.epoch)
        number, member = divmod(int(np.flatnonzero(groups == place.group)[0]), self._window_groups)
        rows, ends = self._rows_of(place.epoch, number)
        row = place.row + (ends[member - 1] if member else 0)
        return int(place.epoch * self.rows + firsts[number] + np.flatnonzero(rows == row)[0])

    def _members(self, groups: Indices, window: int) -> Indices:
        return groups[window * self._window_groups : (window + 1) * self._window_groups]

    def _make_groups(self, epoch: int) -> tuple[Indices, Indices]:
        """The groups in the order of an epoch; the position in it at which each window begins, and that of its end."""
        groups = _permutation(len(self._sizes), "groups", self._seed, epoch)
        before = np.concatenate([[0], np.cumsum(self._sizes[groups])])
        return groups, np.append(before[: -1 : self._window_groups], before[-1])

    def _make_rows(self, epoch: int, window: int) -> tuple[Indices, Indices]:
        """The rows of a window in its order, counted over its groups, and where each group ends in that count."""
        ends = np.cumsum(self._sizes[self._members(self._groups_of(epoch)[0], window)])
        return _permutation(int(ends[-1]), "rows", self._seed, epoch, window), ends


def _permutation(n: int, *owners: int | str) -> Indices:
    # Sorting raw bits and not Generator.permutation: numpy promises the same raw stream for ever, not the same shuffle.
    return np.argsort(np.random.PCG64(derived_seed("order", *owners)).random_raw(n), kind="stable")


class Share(NamedTuple):
    """What one rank takes of each batch: the positions p with begin <= p % batch < end."""

    batch: int
    begin: int
    end: int

    @classmethod
    def of_rank(cls, batch: int, rank: int, world: int) -> Share:
        """Contiguous parts that differ by one rank's at most; of a small batch the last ranks have none.

        >>> [Share.of_rank(10, rank, 4)[1:] for rank in range(4)]
        [(0, 3), (3, 6), (6, 9), (9, 10)]
        """
        part = -(-batch // world)
        return cls(batch, min(rank * part, batch), min((rank + 1) * part, batch))

    def holds(self, positions: Indices) -> Flags:
        """For each position, whether it is of this part."""
        within = positions % self.batch
        found: Flags = (self.begin <= within) & (within < self.end)
        return found


class Row(NamedTuple, Generic[T]):
    """One pair: `payload` is its codes [N] (uint16) or its stored JPEG. `position` is -1 when read in file order."""

    position: int
    uid: str
    caption: str
    payload: T


@dataclass(frozen=True, slots=True)
class LoadedGroup(Generic[T]):
    """The selected rows of a group in memory; `payload(i)` gives the codes or the JPEG of row i."""

    uids: Any
    captions: Any
    """Columns of pyarrow, in which a text takes as much as it has letters."""
    weights: np.ndarray[Any, np.dtype[np.float64]] | None
    """None: all rows are of weight 1 or more."""
    is_down: Flags
    """Left out by a drop list."""
    payload: Callable[[int], T]

    def row(self, position: int, index: int) -> Row[T]:
        """Row `index` as it is given to the user."""
        # A picture may have no caption (filters.caption_required off): to the transformer that is the empty caption.
        caption = self.captions[index].as_py() or ""
        return Row(position, self.uids[index].as_py(), caption, self.payload(index))


class Files:
    """Pinned files, each checked against its receipt when it is opened first in this process."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._checked: set[str] = set()
        self._checking: dict[str, threading.Lock] = {}

    def table(self, ref: FileRef, columns: list[str], group: Group) -> Any:
        """The rows of `group`. The first time the whole file is read and its sha256 compared: DamagedArtifact."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = None
        with self._checking.setdefault(ref.key, threading.Lock()):  # two groups of a file: it is read whole once
            if ref.key not in self._checked:
                source = pa.BufferReader(read_verified(self.store, ref))
                self._checked.add(ref.key)
        if source is None:
            filesystem, root = self.store.arrow()
            source = filesystem.open_input_file(f"{root}/{ref.key}")
        with source, pq.ParquetFile(source) as file:
            wanted, first, kept = [], 0, 0
            for number in range(file.num_row_groups):
                rows = file.metadata.row_group(number).num_rows
                if first < group.first + group.rows and group.first < first + rows:
                    wanted.append(number)
                    kept = first if len(wanted) == 1 else kept
                first += rows
            return file.read_row_groups(wanted, columns=columns).slice(group.first - kept, group.rows)

    def check_size(self, ref: FileRef) -> None:
        """Raises DamagedArtifact if the file is gone or has another size. For tars, which are read by ranges: a full
        digest would read hundreds of megabytes for the first picture (`armchair verify --deep` does)."""
        if ref.key not in self._checked:
            found = self.store.stat(ref.key)
            if found is None or found.bytes != ref.bytes:
                what = f"{found.bytes} bytes" if found else "no file"
                raise DamagedArtifact(f"{self.store.location}/{ref.key}", f"{ref.bytes} bytes", what)
            self._checked.add(ref.key)


Load = Callable[[Files, PinnedShard, Group, Snapshot, str, Drops, Indices | None], LoadedGroup[T]]
"""The rows of a group that are selected; the last one says which of them are needed, None: all."""


class Reader(Generic[T]):
    """The rows of a snapshot, by position or in file order. For one thread at a time.

    While the rows of one window are given, `LOADERS` threads read the groups of the next: those of two windows are in
    memory, whatever the size of the data. A group is read once a window, however few of its rows are asked for.
    """

    def __init__(
        self,
        store: Store,
        snapshot: Snapshot,
        seed: int,
        window_groups: int,
        load: Load[T],
        share: Share | None = None,
    ) -> None:
        """`share` is a promise that spares bytes: other positions are given too, but nothing of them is read ahead."""
        self.snapshot, self._share = snapshot, share
        self._files, self._load = Files(store), load
        tables = [shard.groups.table for shard in snapshot.shards]
        table = np.concatenate(tables)
        shards = np.repeat(np.arange(len(tables), dtype=np.int32), [len(groups) for groups in tables])
        # By crop: the groups of crop k. Epoch e reads those of crop e mod K; their sizes are the same for every k.
        of_crop = [table[:, _CROP] == crop for crop in range(snapshot.crops)]
        self._groups = [(shards[mask], table[mask]) for mask in of_crop]
        self._order = Order(self._groups[0][1][:, _SPLITS[TRAIN]], seed, window_groups)
        self._drops = read_drops(store)
        self._loaded: dict[tuple[int, ...], Future[LoadedGroup[T]]] = {}
        self._ahead_of: tuple[int, int] | None = None
        self._pool = ThreadPoolExecutor(LOADERS, thread_name_prefix="read")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    @property
    def rows_per_epoch(self) -> int:
        """Positions of one epoch, holes included."""
        return self._order.rows

    def rows(self, start: int, stop: int) -> Iterator[Row[T]]:
        """The rows at positions `start` … `stop` - 1, in order, without the holes.

        Raises DamagedArtifact, naming the file, when a shard's bytes are not those of its receipt.
        """
        while start < stop:
            window = self._order.window(start)
            groups, rows = self._order.places(window, start, min(stop, window.stop))
            self._read_ahead(window)
            for position, index, row in zip(itertools.count(start), groups.tolist(), rows.tolist(), strict=False):
                group = self._group(window, index)
                # `weight` thins by hash: over many epochs a row of weight 1/3 is seen in a third of them.
                if group.is_down[row] or (
                    group.weights is not None
                    and derived_share("weight", group.uids[row].as_py(), window.epoch) >= group.weights[row]
                ):
                    continue
                yield group.row(position, row)
            start += len(rows)

    def in_file_order(self, split: str, limit: int | None = None) -> Iterator[Row[T]]:
        """The rows of a split in the order of the shards (which is by hash), of crop 0, dropped ones left out."""
        return itertools.islice(self._in_file_order(split), limit)

    def held_out(self, limit: int | None = None) -> Iterator[Row[T]]:
        """The rows that training never sees, in file order."""
        return self.in_file_order(HELD_OUT, limit)

    def _in_file_order(self, split: str) -> Iterator[Row[T]]:
        waiting: deque[Future[LoadedGroup[T]]] = deque()
        for index in (*np.flatnonzero(self._groups[0][1][:, _SPLITS[split]]).tolist(), *[None] * LOADERS):
            if index is not None:
                waiting.append(self._submit(0, index, split))
            if waiting and (index is None or len(waiting) > LOADERS):
                loaded = waiting.popleft().result()
                yield from (loaded.row(-1, row) for row in np.flatnonzero(~loaded.is_down).tolist())

    def _read_ahead(self, window: Window) -> None:
        """Has the groups of this window and of the next one read, and forgets all others."""
        if self._ahead_of == (window.epoch, window.number):
            return
        self._ahead_of = (window.epoch, window.number)
        wanted: dict[tuple[int, ...], tuple[int, int, Indices | None]] = {}
        for each in (window, self._order.window(window.stop)):
            needed = self._needed(each)
            for group in each.groups.tolist():
                if self._groups[0][1][group, _SPLITS[TRAIN]]:
                    crop = each.epoch % self.snapshot.crops
                    wanted[self._key(each, group)] = (crop, group, None if needed is None else needed[group])
        for key in self._loaded.keys() - wanted.keys():
            self._loaded.pop(key).cancel()
        for key, (crop, group, rows) in wanted.items():
            if key not in self._loaded:
                self._loaded[key] = self._submit(crop, group, TRAIN, rows)

    def _needed(self, window: Window) -> dict[int, Indices] | None:
        """Group -> its rows in our share of a window, ascending."""
        if self._share is None:
            return None
        groups, rows = self._order.places(window, window.start, window.stop)
        is_ours = self._share.holds(np.arange(window.start, window.stop))
        return {group: np.sort(rows[is_ours & (groups == group)]) for group in window.groups.tolist()}

    def _key(self, window: Window, group: int) -> tuple[int, ...]:
        # Whole groups serve a window of the next epoch as well, where all data fits into a few windows.
        crop = window.epoch % self.snapshot.crops
        return (crop, group) if self._share is None else (crop, group, window.epoch, window.number)

    def _group(self, window: Window, index: int) -> LoadedGroup[T]:
        key = self._key(window, index)
        if key not in self._loaded:  # it failed before, or two `rows` take turns in different windows
            self._loaded[key] = self._submit(window.epoch % self.snapshot.crops, index, TRAIN)
        try:
            return self._loaded[key].result()
        except BaseException:
            del self._loaded[key]
            raise

    def _submit(self, crop: int, index: int, split: str, rows: Indices | None = None) -> Future[LoadedGroup[T]]:
        shards, groups = self._groups[crop]
        shard, group = self.snapshot.shards[shards[index]], Group._make(groups[index].tolist())
        # Not a method of ours, which would keep this reader, and its threads, alive.
        return self._pool.submit(self._load, self._files, shard, group, self.snapshot, split, self._drops, rows)


def codes_reader(
    store: Store, snapshot: Snapshot, seed: int, tokenizer: str, window_groups: int = WINDOW_GROUPS["codes"]
) -> Reader[Codes]:
    """Reads codes [N] of a snapshot of TOKENS. Raises StorageError if another tokenizer than `tokenizer` made them."""
    if snapshot.tokenizer != tokenizer:
        raise StorageError(
            f"{store.location}: its codes were made by tokenizer {str(snapshot.tokenizer)[:16]}, not by "
            f"{tokenizer[:16]}.",
            "Codes mean nothing to another tokenizer: name the one that made them, or tokenize again.",
        )
    return Reader(store, snapshot, seed, window_groups, _load_codes)


def pictures_reader(
    store: Store,
    snapshot: Snapshot,
    seed: int,
    window_groups: int = WINDOW_GROUPS["pictures"],
    share: Share | None = None,
) -> Reader[bytes]:
    """Reads stored JPEGs of a snapshot of PAIRS. With a `share` a rank of many reads its own pictures, not all."""
    if share is not None and (share.end - share.begin) * SHARE_OF > share.batch:
        share = None  # its pictures lie so near to each other that what is between them is read along
    return Reader(store, snapshot, seed, window_groups, _load_pictures, share)


def _load_codes(
    files: Files,
    shard: PinnedShard,
    group: Group,
    snapshot: Snapshot,
    split: str,
    drops: Drops,
    needed: Indices | None,
) -> LoadedGroup[Codes]:
    table = files.table(shard.files["parquet"], ["uid", "caption", "split", "weight", "codes", *snapshot.where], group)
    table = table.filter(selection(table, snapshot.where, split)).combine_chunks()
    if not table.num_rows:
        return LoadedGroup(*_common(table, drops), payload=lambda row: np.empty(0, np.uint16))
    codes_MN = table["codes"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    return LoadedGroup(*_common(table, drops), payload=lambda row: codes_MN[row])


def _load_pictures(
    files: Files,
    shard: PinnedShard,
    group: Group,
    snapshot: Snapshot,
    split: str,
    drops: Drops,
    needed: Indices | None,
) -> LoadedGroup[bytes]:
    columns = ["uid", "caption", "status", "split", "weight", "tar_offset", "jpg_size", *snapshot.where]
    table = files.table(shard.files["parquet"], list(dict.fromkeys([*columns, *drops.columns])), group)
    table = table.filter(selection(table, snapshot.where, split))
    tar = shard.files["tar"]
    files.check_size(tar)
    offsets, sizes = (table[name].to_numpy() for name in ("tar_offset", "jpg_size"))
    blocks: dict[int, tuple[int, bytes]] = {}  # row -> where the bytes begin in the tar that hold its JPEG, and they
    for rows in _side_by_side(offsets, sizes, np.arange(table.num_rows) if needed is None else needed):
        base, end = int(offsets[rows[0]]), int(offsets[rows[-1]] + sizes[rows[-1]])
        blocks |= dict.fromkeys(rows.tolist(), (base, files.store.read_range(tar.key, base, end - base)))

    def payload(row: int) -> bytes:
        at, size = int(offsets[row]), int(sizes[row])
        base, block = blocks[row] if row in blocks else (at, files.store.read_range(tar.key, at, size))
        jpeg = block[at - base : at - base + size]
        if not jpeg.startswith(JPEG_START):
            place = f"{files.store.location}/{tar.key}"
            raise DamagedArtifact(place, f"a JPEG of {size} bytes at {at}", "something else")
        return jpeg

    return LoadedGroup(*_common(table, drops), payload=payload)


def _side_by_side(offsets: Indices, sizes: Indices, rows: Indices) -> list[Indices]:
    """The rows in runs that are read in one go: what lies between two of them costs less than another request."""
    if not len(rows):
        return []
    between = offsets[rows[1:]] - (offsets + sizes)[rows[:-1]]
    return np.split(rows, np.flatnonzero(between > GAP_BYTES) + 1)


def _common(table: Any, drops: Drops) -> tuple[Any, Any, np.ndarray[Any, np.dtype[np.float64]] | None, Flags]:
    weights = table["weight"].to_numpy()
    thinned = weights if (weights < 1.0).any() else None
    uids, captions = (table[name].combine_chunks() for name in ("uid", "caption"))
    return uids, captions, thinned, drops.mask(table)


class Prefetch(Generic[T]):
    """Makes the items of `make(0), make(1), …` one step ahead in a thread; counts the seconds its user waited.

    An exception of `make` is raised where the item is taken. Ends with its `with`.
    """

    def __init__(self, make: Callable[[int], T], first: int, stop: int, depth: int = 2) -> None:
        self.waited_s = 0.0
        self._make, self._first, self._stop = make, first, stop
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def take(self) -> T:
        """The next item."""
        started_s = time.perf_counter()
        item, error = self._queue.get()
        self.waited_s += time.perf_counter() - started_s
        if error is not None:
            raise error
        return item  # type: ignore[return-value]  # None only beside an error

    def _run(self) -> None:
        for number in range(self._first, self._stop):
            if self._ended.is_set():
                return
            try:
                made: tuple[T | None, BaseException | None] = (self._make(number), None)
            except BaseException as error:  # carried to the taker, whatever it is
                made = (None, error)
            self._queue.put(made)
            if made[1] is not None:
                return
