"""Pictures that are there more than once: equal bytes, and the same picture encoded or resized another way.

    scatter   some shards -> their kept pairs, once for each key that copies share: the sha256, each band of the dHash
    find      all pairs of one bucket of keys -> links "this one is a copy of that one", each confirmed on pixels
    resolve   links -> which pair goes and which stays in its place -> one drop list (ops/drops.py)

Two dHashes at most `DISTANCE` bits apart agree in one of `DISTANCE` + 1 bands. Scatter and find are Ray tasks, and what
is between them lies in Ray's object store, which spills to disk: a task holds some shards or a bucket, the driver what
is a copy (some 100 bytes each), whatever the number of pairs. Shards are never rewritten. Not here: dHash itself
(ops/pictures.py).

**What stays** is what stayed before, else the first by shard and row: growth adds copies at the end, so a second run
leaves alone what the first one decided. Copies of a pair that was taken down go with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from infra.metrics import Tell, untold
from infra.store import Store, absolute, open_store
from ops.drops import Drops, Hashes, add_drops, drop_rows, from_hex, is_among, read_drop_rows, whole
from ops.errors import DamagedArtifact
from ops.pictures import decode_stored, encode_jpeg, quiet_cv2
from ops.reasons import SUCCESS
from ops.shards import Receipt, read_receipts, read_table
from ops.snapshot import source_fingerprint
from ops.waves import cluster_cpus

Array = np.ndarray[Any, Any]
T = TypeVar("T")

DISTANCE = 5
"""Bits that two dHashes may differ in. Of 3,709 drawings 97.6 % are within 3 bits of their copy at quality 50, 99.8 %
within 5 (white ground: cells that tie, and flip)."""
SIDE = 64
"""Cells a side of the small versions that are compared."""
ENCODED = (10.0, 1.7)
"""A cell may differ by so many levels and, together with them, so many times as much as encoding anew changes it. Of
3,709 drawings the first different pair (two skin tones) is at 1.9, and 99.5 % of copies at quality 50 are below."""
RESIZED = (5.0, 1.48)
"""The same against three quarters of the size and back, where the first different pair is at 1.65."""
CONCENTRATION = 17.0
"""Largest cell difference over the mean one (rms + 1 level): what only one spot has is a change of the drawing."""
RATIO = 0.03
"""Relative difference of the aspect ratios: what rounding makes of a small picture."""

ROWS_A_TASK = 500_000
ENTRIES_A_BUCKET = 2_000_000
"""Of 70 bytes each."""
LOOKS = 4096
"""Looks of pictures in memory, 37 kB each."""
BRUTE = 4096
"""Hashes that are compared each with each; more are split by a part of what is left of them."""
_BY_BYTES = DISTANCE + 1
"""The number of the sha256 among the keys; those below are the bands of the dHash."""

ENTRY = np.dtype(
    [("key", "<u4"), ("place", "<u8"), ("uid", "S16"), ("sha", "S16"), ("dhash", "<u8"), ("at", "<u8"), ("size", "<u4")]
)
"""A kept pair under one key. `place` orders what stays: 0 taken down, 1 stayed before, 2 others; then shard and row."""
LINK = np.dtype([("loser", "<u8"), ("winner", "<u8"), ("loser_uid", "S16"), ("winner_uid", "S16"), ("copy", "?")])
"""`copy`: the loser goes wherever the winner goes. Else it goes if the winner stays."""


# --- one picture against another -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Look:
    """A small version [SIDE, SIDE, 3] uint8; how many levels each of its cells changes when the picture is encoded
    anew, and when it is also resized before that; and the means of 4 × 4 blocks, [48] float32."""

    small: Array
    encoded: Array
    resized: Array
    ratio: float
    coarse: Array
    slack: Array


def look(jpeg: bytes) -> Look:
    """The look of a stored picture: it is encoded anew, poorly, and three quarters as large. Raises ValueError."""
    cv2 = quiet_cv2()
    pixels = decode_stored(jpeg)
    height, width = pixels.shape[:2]
    small = _small(pixels)
    less = (max(1, round(0.75 * width)), max(1, round(0.75 * height)))
    worse = ((pixels, 40), (cv2.resize(pixels, less, interpolation=cv2.INTER_AREA), 50))
    changes = [cv2.absdiff(small, _small(decode_stored(encode_jpeg(*one)))) for one in worse]
    around = np.ones((3, 3), np.uint8)
    encoded, resized = (cv2.dilate(change, around) for change in (changes[0], np.maximum(*changes)))
    return Look(small, encoded, resized, width / height, _means(small), _means(resized))


def is_near(coarse_a: Array, slack_a: Array, coarse_b: Array, slack_b: Array) -> Array:
    """bool: what `same` could be true for, from means alone: a mean of differences is not larger than their bounds'."""
    floor, times = ENCODED
    found: Array = (np.abs(coarse_a - coarse_b) <= times * (floor + slack_a + slack_b)).all(axis=-1)
    return found


def same(a: Sequence[Look], b: Sequence[Look]) -> Array:
    """bool [n]: a[i] and b[i] are one picture, re-encoded or resized.

    No cell may differ by more than a new encoding of either changes it there, with a margin: at an edge much, in the
    fill of an area little, so that another tone of the same drawing is another picture. And the difference must lie
    where a new encoding puts it, everywhere, and not in one spot.
    """
    if not len(a):
        return np.zeros(0, bool)
    levels = np.abs(np.stack([x.small for x in a]).astype(np.int16) - np.stack([x.small for x in b]))
    levels = levels.astype(np.float32)
    cells = (1, 2, 3)
    is_explained = np.zeros(len(a), bool)
    for name, (floor, times) in (("encoded", ENCODED), ("resized", RESIZED)):
        changes = (np.stack([getattr(x, name) for x in side]) for side in (a, b))
        is_explained |= (levels / (floor + np.maximum(*changes))).max(axis=cells) <= times
    is_spread = levels.max(axis=cells) <= CONCENTRATION * (np.sqrt(np.square(levels).mean(axis=cells)) + 1)
    ratios = np.array([x.ratio for x in a]) / np.array([x.ratio for x in b])
    found: Array = is_explained & is_spread & (np.abs(np.log(ratios)) <= RATIO)
    return found


def _small(pixels: Array) -> Array:
    cv2 = quiet_cv2()
    small: Array = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return small


def _means(cells: Array) -> Array:
    means: Array = cells.reshape(4, SIDE // 4, 4, SIDE // 4, 3).mean(axis=(1, 3), dtype=np.float32).reshape(-1)
    return means


# --- hashes ----------------------------------------------------------------------------------------------------------
def _parts(bits: int, count: int) -> list[tuple[int, int]]:
    """(first bit, bits) of `count` parts of a number."""
    edges = [bits * part // count for part in range(count + 1)]
    return [(low, high - low) for low, high in pairwise(edges)]


BANDS = _parts(64, DISTANCE + 1)


def _part(numbers: Array, part: tuple[int, int]) -> Array:
    first, bits = part
    return (numbers >> np.uint64(first)) & np.uint64((1 << bits) - 1)


def near_pairs(dhashes: Array, band: int) -> tuple[Array, Array]:
    """(i, j) of the different hashes (ascending, u64) of one value of a band that are at most `DISTANCE` apart, but not
    those that agree in an earlier band as well: they are found there."""
    i, j = _near(dhashes, band)
    differ = dhashes[i] ^ dhashes[j]
    is_new = np.ones(len(i), bool)
    for earlier in BANDS[:band]:
        is_new &= _part(differ, earlier) != 0
    return i[is_new], j[is_new]


def _near(dhashes: Array, band: int) -> tuple[Array, Array]:
    if len(dhashes) <= BRUTE:
        return _compared(dhashes, np.arange(len(dhashes)))
    first, bits = BANDS[band]
    rest = (dhashes >> np.uint64(first + bits)) << np.uint64(first) | _part(dhashes, (0, first))
    found = []
    for part in _parts(64 - bits, DISTANCE + 1):  # they agree in one of these as well
        values = _part(rest, part)
        order = np.argsort(values, kind="stable")
        edges = np.flatnonzero(np.diff(values[order])) + 1
        found += [_compared(dhashes, group) for group in np.split(order, edges) if len(group) > 1]
    pairs = np.unique(np.concatenate([np.stack(pair, axis=1) for pair in found]), axis=0)
    return pairs[:, 0], pairs[:, 1]


def _compared(dhashes: Array, group: Array) -> tuple[Array, Array]:
    """The pairs (i < j) of a group, each with each, in blocks of rows."""
    pairs = []
    for start in range(0, len(group), 256):
        rows = group[start : start + 256]
        apart = np.bitwise_count(dhashes[rows, None] ^ dhashes[None, group[start:]])
        row, column = np.nonzero(apart <= DISTANCE)
        is_after = column > row
        pairs.append(np.stack([rows[row[is_after]], group[start + column[is_after]]]))
    both = np.sort(np.concatenate(pairs, axis=1), axis=0)
    return both[0], both[1]


# --- scatter ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Standing:
    """What earlier lists decided: pairs that are down, pairs and URLs that were taken down, pairs that stayed."""

    down: Hashes
    taken: Drops
    stayed: Hashes


def read_standing(store: Store) -> Standing:
    """From the drop lists of PAIRS."""
    import pyarrow.compute as pc

    rows = read_drop_rows(store)
    taken = rows.filter(pc.equal(rows["kind"], "takedown"))
    down = rows.filter(pc.not_equal(rows["kind"], "takedown"))

    def among(table: Any, column: str) -> Hashes:
        return np.unique(from_hex(table[column].to_pylist()))

    urls = taken.filter(pc.is_null(taken["uid"]))
    return Standing(among(down, "uid"), Drops(among(taken, "uid"), among(urls, "url_hash")), among(rows, "stays"))


def scatter(location: str, receipts: Sequence[Receipt], standing: Standing, buckets: int) -> list[Array]:
    """The kept pairs of some shards by bucket, each under all of its keys (`ENTRY`)."""
    store = open_store(location)
    every = np.concatenate([keyed for receipt in receipts for keyed in _keyed(*_entries(store, receipt, standing))])
    bucket = (every["key"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(33)) % np.uint64(buckets)
    order = np.argsort(bucket, kind="stable")
    return np.split(every[order], np.searchsorted(bucket[order], np.arange(1, buckets).astype(np.uint64)))


def _entries(store: Store, receipt: Receipt, standing: Standing) -> tuple[Array, Array]:
    """(entries without a key, whether each has a dHash) of the pairs of a shard that are kept and not down."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = ["uid", "status", "sha256", "dhash", "tar_offset", "jpg_size"]
    table = read_table(store, receipt, list(dict.fromkeys([*columns, *standing.taken.columns])))
    table = table.append_column("row", pa.array(np.arange(table.num_rows)))
    table = table.filter(pc.equal(table["status"], SUCCESS))
    uids = from_hex(table["uid"].to_pylist())
    rank = np.where(standing.taken.mask(table), 0, np.where(is_among(uids, standing.stayed), 1, 2))
    entries = np.zeros(table.num_rows, ENTRY)
    place = table["row"].to_numpy().astype(np.uint64) | np.uint64(receipt.shard << 32)
    entries["place"] = place | rank.astype(np.uint64) << np.uint64(60)
    entries["uid"] = uids
    entries["sha"] = [bytes.fromhex(sha[:32]) if sha else b"" for sha in table["sha256"].to_pylist()]
    entries["dhash"] = [int(value, 16) if value else 0 for value in table["dhash"].to_pylist()]
    entries["at"], entries["size"] = table["tar_offset"].to_numpy(), table["jpg_size"].to_numpy()
    is_up = (rank == 0) | ~is_among(uids, standing.down)
    return entries[is_up], table["dhash"].is_valid().to_numpy()[is_up]


def _keyed(entries: Array, has_dhash: Array) -> Iterator[Array]:
    for number, band in enumerate(BANDS):
        some = entries[has_dhash]
        some["key"] = _part(some["dhash"], band) | np.uint64(number << 16)
        yield some
    some = entries[entries["sha"] != b""]
    if len(some):
        some["key"] = np.array([int.from_bytes(sha[:2], "big") for sha in some["sha"]], "<u4") | _BY_BYTES << 16
    yield some


# --- find ------------------------------------------------------------------------------------------------------------
def find(location: str, tars: dict[int, str], *parts: Array) -> Array:
    """The links (`LINK`) among the entries of one bucket. `tars`: shard -> key of its tar. Raises DamagedArtifact."""
    entries = np.concatenate(parts)
    entries = entries[np.lexsort((entries["place"], entries["key"]))]
    looks = _Looks(open_store(location), tars)
    found = [np.zeros(0, LINK)]
    with ThreadPoolExecutor(8) as pool:
        for group in _runs(entries, "key"):
            band = int(group["key"][0]) >> 16
            found.append(_same_bytes(group)[1] if band == _BY_BYTES else _same_pictures(group, band, looks, pool))
    return np.concatenate(found)


def _runs(entries: Array, field: str) -> Iterator[Array]:
    """The runs of two and more entries that have the same value, of entries in the order of that field."""
    for run in np.split(entries, np.flatnonzero(entries[field][1:] != entries[field][:-1]) + 1):
        if len(run) > 1:
            yield run


def _links(losers: Array, winners: Array, copy: bool) -> Array:
    links = np.zeros(len(losers), LINK)
    links["loser"], links["winner"], links["copy"] = losers["place"], winners["place"], copy
    links["loser_uid"], links["winner_uid"] = losers["uid"], winners["uid"]
    return links


def _same_bytes(group: Array) -> tuple[Array, Array]:
    """(the first of each sha256 and those without, in order of place; links of the others to it)."""
    ordered = group[np.lexsort((group["place"], group["sha"]))]
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = (ordered["sha"][1:] != ordered["sha"][:-1]) | (ordered["sha"][1:] == b"")
    winner = np.maximum.accumulate(np.where(is_first, np.arange(len(ordered)), 0))
    firsts = ordered[is_first]
    links = _links(ordered[~is_first], ordered[winner[~is_first]], copy=True)
    return firsts[np.argsort(firsts["place"])], links


def _same_pictures(group: Array, band: int, looks: _Looks, pool: ThreadPoolExecutor) -> Array:
    """The links among the entries of one value of a band."""
    firsts, _ = _same_bytes(group)  # a copy by bytes is looked for under its sha256
    firsts = firsts[np.argsort(firsts["dhash"], kind="stable")]
    dhashes, starts = np.unique(firsts["dhash"], return_index=True)
    of_hash = np.split(firsts, starts[1:])
    i, j = near_pairs(dhashes, band)
    asked = {int(number) for number in (*i, *j)}
    asked |= {number for number, some in enumerate(of_hash) if len(some) > 1 and band == 0}
    found = []
    leaders: dict[int, Array] = {}
    for number in sorted(asked):
        leaders[number], links = _led(of_hash[number], looks, pool)
        if band == 0:
            found.append(links)
    pairs = [(a, b) for p, q in zip(i, j, strict=True) for a in leaders[int(p)] for b in leaders[int(q)]]
    for start in range(0, len(pairs), 256):
        a, b = (np.array([*side], ENTRY) for side in zip(*pairs[start : start + 256], strict=True))
        is_same = is_near(*looks.read(a, pool), *looks.read(b, pool))
        a, b = a[is_same], b[is_same]
        is_same = same([looks.of(one) for one in a], [looks.of(one) for one in b])
        a, b = a[is_same], b[is_same]
        is_later = a["place"] > b["place"]
        found.append(_links(np.where(is_later, a, b), np.where(is_later, b, a), copy=False))
    return np.concatenate([np.zeros(0, LINK), *found])


def _led(some: Array, looks: _Looks, pool: ThreadPoolExecutor) -> tuple[Array, Array]:
    """(pictures of one dHash, none of them another's copy; links of the others to the first of these that they are)."""
    leads, winners = [0], np.arange(len(some))
    if len(some) > 1:
        coarse, slack = looks.read(some, pool)
        for number in range(1, len(some)):
            may_be = is_near(coarse[number], slack[number], coarse[leads], slack[leads])
            alike = looks.first_alike(some[number], some[np.array(leads)[may_be]])
            if alike is None:
                leads.append(number)
            else:
                winners[number] = np.array(leads)[may_be][alike]
    goes = winners != np.arange(len(some))
    return some[leads], _links(some[goes], some[winners[goes]], copy=True)


class _Looks:
    """The looks of pictures, read from the tars; the last `LOOKS` are kept."""

    def __init__(self, store: Store, tars: dict[int, str]) -> None:
        self._store, self._tars = store, tars
        self._kept: OrderedDict[int, Look] = OrderedDict()

    def read(self, entries: Array, pool: ThreadPoolExecutor) -> tuple[Array, Array]:
        """`coarse` and `slack` of each entry, [n, 48]."""
        coarse, slack = [], []
        for start in range(0, len(entries), LOOKS // 2):
            some = entries[start : start + LOOKS // 2]
            missing = {int(entry["place"]): entry for entry in some if int(entry["place"]) not in self._kept}
            self._kept.update(zip(missing, pool.map(self._look, missing.values()), strict=True))
            coarse += [self.of(entry).coarse for entry in some]
            slack += [self.of(entry).slack for entry in some]
            while len(self._kept) > LOOKS:
                self._kept.popitem(last=False)
        return np.stack(coarse), np.stack(slack)

    def of(self, entry: Any) -> Look:
        """The look of one picture."""
        place = int(entry["place"])
        if place not in self._kept:
            self._kept[place] = self._look(entry)
        self._kept.move_to_end(place)
        return self._kept[place]

    def first_alike(self, entry: Any, others: Array) -> int | None:
        """Which of the others, in their order, is the first that is the same picture."""
        for start in range(0, len(others), 64):
            some = [self.of(other) for other in others[start : start + 64]]
            alike = np.flatnonzero(same([self.of(entry)] * len(some), some))
            if len(alike):
                return start + int(alike[0])
        return None

    def _look(self, entry: Any) -> Look:
        key = self._tars[int(entry["place"]) >> 32 & 0xFFF_FFFF]
        at, size = int(entry["at"]), int(entry["size"])
        try:
            return look(self._store.read_range(key, at, size))
        except (FileNotFoundError, ValueError) as error:
            found = "no file" if isinstance(error, FileNotFoundError) else "something else"
            raise DamagedArtifact(f"{self._store.location}/{key}", f"a JPEG of {size} bytes at {at}", found) from error


# --- resolve ---------------------------------------------------------------------------------------------------------
def resolve(links: Array) -> tuple[Array, Array]:
    """(uids that go, uids that stay in their place): each that goes was confirmed as a copy of one that stays, or of a
    copy of it; a chain of ever further pictures is not followed. Found again without these, nothing goes."""
    copies, near = links[links["copy"]], links[~links["copy"]]
    near = near[np.lexsort((near["winner"], near["loser"]))]
    gone: set[int] = set()
    is_decided = np.zeros(len(near), bool)
    for number, (loser, winner) in enumerate(zip(near["loser"].tolist(), near["winner"].tolist(), strict=True)):
        if loser not in gone and winner not in gone:  # in order of place: what becomes of the winner is known
            gone.add(loser)
            is_decided[number] = True
    decided = np.concatenate([copies, near[is_decided]])
    decided = decided[np.unique(decided["loser"], return_index=True)[1]]
    if not len(decided):
        return np.zeros(0, "S16"), np.zeros(0, "S16")
    places, winners, uids = decided["loser"], decided["winner"].copy(), decided["winner_uid"].copy()
    while True:  # two steps at most: a copy of a copy of one that is near
        at = np.minimum(np.searchsorted(places, winners), len(places) - 1)
        is_gone = places[at] == winners
        if not is_gone.any():
            break
        winners[is_gone], uids[is_gone] = winners[at[is_gone]], uids[at[is_gone]]
    is_up = places >> np.uint64(60) > 0  # what was taken down is down already
    return decided["loser_uid"][is_up], uids[is_up]


def deduplicate(pairs: str, tell: Tell = untold) -> dict[str, Any]:
    """Looks for copies among the kept pairs of PAIRS on the connected Ray, and writes one drop list of those that go.

    Raises UsageError for what is no PAIRS, DamagedArtifact for a shard whose picture or sidecar can't be read.
    """
    store, location = open_store(pairs), absolute(pairs)
    source_fingerprint(store, "pairs")
    receipts = list(read_receipts(store).values())
    kept = sum(receipt.kept for receipt in receipts)
    buckets = max(2 * cluster_cpus(), -(-kept * (len(BANDS) + 1) // ENTRIES_A_BUCKET))
    tars = {receipt.shard: receipt.files["tar"].key for receipt in receipts}
    links = _on_ray(location, list(_chunks(receipts)), read_standing(store), buckets, tars, tell)
    gone, stay = resolve(links)
    names = [(whole(uid), None) for uid in gone.tolist()]
    added = add_drops(store, drop_rows(names, "duplicate", [whole(uid) for uid in stay.tolist()]))
    return {"pairs": kept, "shards": len(receipts), "duplicates": added, "kept": kept - added}


def _chunks(receipts: Sequence[Receipt]) -> Iterator[list[Receipt]]:
    """Shards for one task, some `ROWS_A_TASK` kept pairs together."""
    some: list[Receipt] = []
    for receipt in receipts:
        some.append(receipt)
        if sum(one.kept for one in some) >= ROWS_A_TASK:
            yield some
            some = []
    if some:
        yield some


def _on_ray(
    location: str, chunks: list[list[Receipt]], standing: Standing, buckets: int, tars: dict[int, str], tell: Tell
) -> Array:
    import ray

    # Pure functions whose results are no commit: Ray may do them again, also to make what went with a node once more.
    scatter_remote = ray.remote(scatter).options(max_retries=2, num_returns=buckets, name="dedup scatter")
    find_remote = ray.remote(find).options(max_retries=2, name="dedup find")
    standing_ref, tars_ref = ray.put(standing), ray.put(tars)
    parts: list[list[Any]] = []

    def scattered(chunk: list[Receipt]) -> Any:
        refs = scatter_remote.remote(location, chunk, standing_ref, buckets)
        parts.append(refs)
        return refs[0]

    for done, _ in enumerate(_windowed(chunks, scattered, fetch=False), 1):
        tell("parts read", done, len(chunks))
    found = [np.zeros(0, LINK)]
    by_bucket = [[refs[bucket] for refs in parts] for bucket in range(buckets)]
    parts.clear()
    while_open = _windowed(by_bucket, lambda refs: find_remote.remote(location, tars_ref, *refs), fetch=True)
    for done, links in enumerate(while_open, 1):
        found.append(links)
        tell("buckets", done, buckets)
    return np.concatenate(found)


def _windowed(work: Sequence[T], submit: Callable[[T], Any], *, fetch: bool) -> Iterator[Any]:
    """Submits with a bounded window in flight; yields each result (with `fetch`), in the order of ends."""
    import ray
    from ray.exceptions import RayTaskError

    waiting, window = iter(work), 2 * cluster_cpus()
    in_flight: list[Any] = []
    try:
        while True:
            while len(in_flight) < window and (item := next(waiting, None)) is not None:
                in_flight.append(submit(item))
            if not in_flight:
                return
            (ready,), in_flight = ray.wait(in_flight, num_returns=1)
            result = ray.get(ready)
            yield result if fetch else None
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, BaseException) else error) from None
    finally:
        for ref in in_flight:
            ray.cancel(ref)
