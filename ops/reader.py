"""Reading pinned shards in a training order: the cursor is one number, the position.

`Order` maps a position to (epoch, group, row) without state: the groups of a snapshot are permuted by (seed, epoch);
each run of W groups in that order is a window, whose rows are permuted together. So the order is the same for any
number of workers, a resume starts anywhere, and memory is W groups. Positions never shift: a row that is thinned out
by its `weight` or taken down by a drop list is a hole. May not live here: pixels, tokens, tensors.
"""

from __future__ import annotations

import queue
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from infra.store import Store
from ops.drops import Drops, read_drops
from ops.errors import DamagedArtifact, StorageError
from ops.seeds import derived_seed, derived_share
from ops.shards import FileRef, read_verified
from ops.snapshot import HELD_OUT, TRAIN, Group, Kind, PinnedShard, Snapshot, selection

Codes = np.ndarray[Any, np.dtype[np.uint16]]
T = TypeVar("T")

JPEG_START = b"\xff\xd8"
WINDOW_GROUPS: dict[Kind, int] = {"pictures": 16, "codes": 64}
"""Groups whose rows are permuted together in training, W: so many are in memory."""


@dataclass(frozen=True)
class Place:
    """Where a position lies: `row` counts the selected rows of `group`, `group` those of one epoch."""

    epoch: int
    group: int
    row: int


class Order:
    """A stateless shuffle of rows that come in groups: every row exactly once an epoch, in windows of W groups.

    >>> order = Order([3, 2], seed=0, window_groups=2)
    >>> sorted((p.group, p.row) for p in map(order.at, range(5, 10)))
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    """

    def __init__(self, sizes: Sequence[int], seed: int, window_groups: int) -> None:
        """`sizes` are the selected rows of each group. Raises ValueError if there is none."""
        self.rows = sum(sizes)
        if not self.rows:
            raise ValueError("an order over no rows")
        self._sizes = np.asarray(sizes, np.int64)
        self._seed, self._window_groups = seed, window_groups
        # The tables of the last epoch and the last window: a lookup is pure, these only make it cheap.
        self._epoch: tuple[int, Any, list[int]] | None = None
        self._window: tuple[tuple[int, int], Any, list[int]] | None = None

    def at(self, position: int) -> Place:
        """The place of a position (0, 1, … without end)."""
        epoch, within = divmod(position, self.rows)
        groups, firsts = self._groups_of(epoch)
        window = bisect_right(firsts, within) - 1
        rows, ends = self._rows_of(epoch, window)
        row = int(rows[within - firsts[window]])
        member = bisect_right(ends, row)
        group = int(groups[window * self._window_groups + member])
        return Place(epoch, group, row - (ends[member - 1] if member else 0))

    def position(self, place: Place) -> int:
        """The position of a place, which `at` leads back to: one permutation of groups and one of a window's rows.

        >>> order = Order([3, 2], seed=0, window_groups=2)
        >>> order.at(order.position(Place(7, 1, 0)))
        Place(epoch=7, group=1, row=0)
        """
        groups, firsts = self._groups_of(place.epoch)
        window, member = divmod(int(np.flatnonzero(groups == place.group)[0]), self._window_groups)
        rows, ends = self._rows_of(place.epoch, window)
        row = place.row + (ends[member - 1] if member else 0)
        return int(place.epoch * self.rows + firsts[window] + np.flatnonzero(rows == row)[0])

    def _groups_of(self, epoch: int) -> tuple[Any, list[int]]:
        """The groups in the order of an epoch, and the position within it at which each window begins."""
        if self._epoch is None or self._epoch[0] != epoch:
            groups = _permutation(len(self._sizes), "groups", self._seed, epoch)
            before = np.concatenate([[0], np.cumsum(self._sizes[groups])])
            self._epoch = (epoch, groups, before[:: self._window_groups].tolist())
        return self._epoch[1:]

    def _rows_of(self, epoch: int, window: int) -> tuple[Any, list[int]]:
        """The rows of a window in its order, counted over its groups, and where each group ends in that count."""
        if self._window is None or self._window[0] != (epoch, window):
            members = self._groups_of(epoch)[0][window * self._window_groups : (window + 1) * self._window_groups]
            after = np.cumsum(self._sizes[members]).tolist()
            self._window = ((epoch, window), _permutation(after[-1], "rows", self._seed, epoch, window), after)
        return self._window[1:]


def _permutation(n: int, *owners: int | str) -> Any:
    # Sorting raw bits and not Generator.permutation: numpy promises the same raw stream for ever, not the same shuffle.
    return np.argsort(np.random.PCG64(derived_seed("order", *owners)).random_raw(n), kind="stable")


@dataclass(frozen=True)
class Row(Generic[T]):
    """One pair: `payload` is its codes [N] (uint16) or its stored JPEG. `position` is -1 when read in file order."""

    position: int
    uid: str
    caption: str
    payload: T


@dataclass(frozen=True)
class LoadedGroup(Generic[T]):
    """The selected rows of a group in memory; `payload(i)` gives the codes or the JPEG of row i."""

    uids: list[str]
    captions: list[str]
    weights: list[float]
    is_down: list[bool]
    """Left out by a drop list."""
    payload: Callable[[int], T]


class Files:
    """Pinned files, each checked against its receipt when it is opened first in this process."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._checked: set[str] = set()

    def table(self, ref: FileRef, columns: list[str], group: Group) -> Any:
        """The rows of `group`. The first time the whole file is read and its sha256 compared: DamagedArtifact."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if ref.key not in self._checked:
            source = pa.BufferReader(read_verified(self.store, ref))
            self._checked.add(ref.key)
        else:
            filesystem, root = self.store.arrow()
            source = filesystem.open_input_file(f"{root}/{ref.key}")
        with source:
            file = pq.ParquetFile(source)
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


Load = Callable[[Files, PinnedShard, Group, Snapshot, str, Drops], LoadedGroup[T]]


class Reader(Generic[T]):
    """The rows of a snapshot, by position or in file order. For one thread at a time."""

    def __init__(self, store: Store, snapshot: Snapshot, seed: int, window_groups: int, load: Load[T]) -> None:
        self.snapshot = snapshot
        self._files, self._load, self._window_groups = Files(store), load, window_groups
        # By crop: the groups of crop k. Epoch e reads those of crop e mod K; their sizes are the same for every k.
        self._groups: list[list[tuple[PinnedShard, Group]]] = [[] for _ in range(snapshot.crops)]
        for shard in snapshot.shards:
            for group in shard.groups:
                self._groups[group.crop].append((shard, group))
        self._order = Order([group.train for _, group in self._groups[0]], seed, window_groups)
        self._loaded: OrderedDict[tuple[int, int], LoadedGroup[T]] = OrderedDict()
        self._drops = read_drops(store)

    @property
    def rows_per_epoch(self) -> int:
        """Positions of one epoch, holes included."""
        return self._order.rows

    def rows(self, start: int, stop: int) -> Iterator[Row[T]]:
        """The rows at positions `start` … `stop` - 1, in order, without the holes.

        Raises DamagedArtifact, naming the file, when a shard's bytes are not those of its receipt.
        """
        for position in range(start, stop):
            place = self._order.at(position)
            group = self._group(place.epoch % self.snapshot.crops, place.group)
            uid = group.uids[place.row]
            # `weight` thins by hash: over many epochs a row of weight 1/3 is seen in a third of them.
            if group.is_down[place.row] or derived_share("weight", uid, place.epoch) >= group.weights[place.row]:
                continue
            yield Row(position, uid, group.captions[place.row], group.payload(place.row))

    def in_file_order(self, split: str, limit: int | None = None) -> Iterator[Row[T]]:
        """The rows of a split in the order of the shards (which is by hash), of crop 0, dropped ones left out."""
        given = 0
        for shard, group in self._groups[0]:
            if not getattr(group, split):
                continue
            loaded = self._load(self._files, shard, group, self.snapshot, split, self._drops)
            for index, uid in enumerate(loaded.uids):
                if limit is not None and given >= limit:
                    return
                if not loaded.is_down[index]:
                    given += 1
                    yield Row(-1, uid, loaded.captions[index], loaded.payload(index))

    def held_out(self, limit: int | None = None) -> Iterator[Row[T]]:
        """The rows that training never sees, in file order."""
        return self.in_file_order(HELD_OUT, limit)

    def _group(self, crop: int, index: int) -> LoadedGroup[T]:
        if (crop, index) not in self._loaded:
            while len(self._loaded) >= self._window_groups:
                self._loaded.popitem(last=False)
            shard, group = self._groups[crop][index]
            self._loaded[crop, index] = self._load(self._files, shard, group, self.snapshot, TRAIN, self._drops)
        self._loaded.move_to_end((crop, index))
        return self._loaded[crop, index]


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
    store: Store, snapshot: Snapshot, seed: int, window_groups: int = WINDOW_GROUPS["pictures"]
) -> Reader[bytes]:
    """Reads stored JPEGs of a snapshot of PAIRS."""
    return Reader(store, snapshot, seed, window_groups, _load_pictures)


def _load_codes(
    files: Files, shard: PinnedShard, group: Group, snapshot: Snapshot, split: str, drops: Drops
) -> LoadedGroup[Codes]:
    table = files.table(shard.files["parquet"], ["uid", "caption", "split", "weight", "codes", *snapshot.where], group)
    table = table.filter(selection(table, snapshot.where, split)).combine_chunks()
    codes_MN = table["codes"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    return LoadedGroup(*_common(table, drops), payload=lambda row: codes_MN[row])


def _load_pictures(
    files: Files, shard: PinnedShard, group: Group, snapshot: Snapshot, split: str, drops: Drops
) -> LoadedGroup[bytes]:
    columns = ["uid", "caption", "status", "split", "weight", "tar_offset", "jpg_size", *snapshot.where]
    table = files.table(shard.files["parquet"], list(dict.fromkeys([*columns, *drops.columns])), group)
    table = table.filter(selection(table, snapshot.where, split))
    tar = shard.files["tar"]
    files.check_size(tar)
    offsets, sizes = table["tar_offset"].to_pylist(), table["jpg_size"].to_pylist()
    if not offsets:
        return LoadedGroup([], [], [], [], payload=lambda row: b"")
    base, end = offsets[0], offsets[-1] + sizes[-1]
    # Pictures of a group lie side by side, one read; a few held-out ones among many are read one by one.
    block = files.store.read_range(tar.key, base, end - base) if end - base < 4 * sum(sizes) + (1 << 16) else None

    def payload(row: int) -> bytes:
        at, size = offsets[row], sizes[row]
        jpeg = block[at - base : at - base + size] if block else files.store.read_range(tar.key, at, size)
        if not jpeg.startswith(JPEG_START):
            place = f"{files.store.location}/{tar.key}"
            raise DamagedArtifact(place, f"a JPEG of {size} bytes at {at}", "something else")
        return jpeg

    return LoadedGroup(*_common(table, drops), payload=payload)


def _common(table: Any, drops: Drops) -> tuple[list[str], list[str], list[float], list[bool]]:
    # A picture may have no caption (filters.caption_required off): to the transformer that is the empty caption.
    captions = [caption or "" for caption in table["caption"].to_pylist()]
    return table["uid"].to_pylist(), captions, table["weight"].to_pylist(), drops.mask(table).tolist()


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
