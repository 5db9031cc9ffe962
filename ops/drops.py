"""Drop lists: pairs that are left out after their shard was committed. Shards are never rewritten for it.

    DIR/drops/<sha256>.parquet   uid url_hash kind stays; immutable, named by its digest, all read as a union

A row names a pair by its `uid`, or a URL by its hash: that holds for whatever pair has the URL, as the list says it or
after redirects, also in shards that come later. `kind` says why, `stays` which pair is there instead of a duplicate.
A list holds no times: equal drops give equal bytes. Codes have no URLs, so in TOKENS the uids count; a pair that is
down in PAIRS is not encoded in the first place (ops/tokenize.py). May not live here: which pairs go (ops/takedown.py,
ops/picture_duplicates.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from infra.store import Store, join, open_store, parent
from ops.errors import DamagedArtifact, StorageError
from ops.recipes import RECIPE, read_json, sha256
from ops.shards import committed_generations, list_receipts, read_receipt

if TYPE_CHECKING:
    import pyarrow as pa

DROPS = "drops/"
Kind = Literal["takedown", "filter", "duplicate"]
"""Why: a takedown takes copies of the picture with it when `dedup` finds them, a filter does not."""
Hashes = np.ndarray[Any, np.dtype[np.bytes_]]
"""16 bytes each. numpy pads with zeros, and all are of one length, so none is taken for another."""
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def url_hash(url: str) -> bytes:
    """blake2b-128 of a URL as the list has it.

    >>> url_hash("http://a/1.jpg").hex()
    '28b8f16a524ca368869c3848860d0ca1'
    """
    return hashlib.blake2b(url.encode(), digest_size=16).digest()


def hashes(values: Iterable[bytes]) -> Hashes:
    """The values, ascending, each once."""
    return np.unique(np.array(list(values), "S16"))


def whole(value: bytes) -> bytes:
    """The 16 bytes of an element: numpy drops zeros at its end."""
    return value.ljust(16, b"\0")


def from_hex(column: Sequence[str | None]) -> Hashes:
    """The uids or hashes of a column, in its order, without nulls. Raises ValueError for what is no 32 hex digits."""
    digits = [value for value in column if value is not None]
    if any(len(value) != 32 for value in digits):
        raise ValueError("a uid or a hash has 32 hex digits")
    return np.frombuffer(bytes.fromhex("".join(digits)), "S16")


def is_among(values: Hashes, ascending: Hashes) -> Flags:
    """For each value, whether it is one of `ascending`.

    >>> is_among(hashes([b"a" * 16, b"c" * 16]), hashes([b"b" * 16, b"c" * 16])).tolist()
    [False, True]
    """
    if not len(ascending):
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: Flags = ascending[at] == values
    return found


@dataclass(frozen=True)
class Drops:
    """What is down in a stage: uids and hashes of URLs, ascending; 16 bytes each."""

    uids: Hashes
    urls: Hashes

    @property
    def columns(self) -> list[str]:
        """The columns that `mask` needs of a sidecar; URLs are read only where one is down."""
        return ["uid", "url", "final_url"] if len(self.urls) else ["uid"]

    def mask(self, table: pa.Table) -> Flags:
        """bool [rows]: down. Of a table without URLs (codes) by the uids alone."""
        if not len(self.uids) and not len(self.urls):
            return np.zeros(table.num_rows, bool)
        down = is_among(from_hex(table["uid"].to_pylist()), self.uids)
        if len(self.urls) and "url" in table.column_names:
            down |= is_among(hashes_of_urls(table["url"].to_pylist()), self.urls)
            down |= is_among(hashes_of_urls(table["final_url"].to_pylist()), self.urls)
        return down

    def __or__(self, other: Drops) -> Drops:
        return Drops(np.union1d(self.uids, other.uids), np.union1d(self.urls, other.urls))


def hashes_of_urls(urls: Sequence[str | None]) -> Hashes:
    """The hash of each URL; of a null one that no URL has."""
    return np.array([b"" if url is None else url_hash(url) for url in urls], "S16")


def drop_schema() -> pa.Schema:
    """The columns of a drop list. `uid` or `url_hash` may be null, not both; `stays` is a uid, of a duplicate only."""
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in ("uid", "url_hash", "kind", "stays")])


def drop_rows(
    names: Sequence[tuple[bytes | None, bytes | None]], kind: Kind, stays: Sequence[bytes] | None = None
) -> pa.Table:
    """Rows of a drop list of (uid, hash of a URL) each; `stays`: for each the uid of the pair that is there instead."""
    import pyarrow as pa

    def column(side: int) -> list[str | None]:
        return [None if (name := names[row][side]) is None else name.hex() for row in range(len(names))]

    instead = [None] * len(names) if stays is None else [uid.hex() for uid in stays]
    return pa.table([column(0), column(1), [kind] * len(names), instead], schema=drop_schema())


def list_drops(store: Store) -> list[str]:
    """The keys of a stage's drop lists."""
    return [entry.key for entry in store.list(DROPS)]


def read_drop_list(store: Store, key: str) -> pa.Table:
    """The rows of one list. Raises DamagedArtifact if its bytes are not those that its name says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, named = store.read(key), key.removeprefix(DROPS).removesuffix(".parquet")
    if sha256(data) != named:
        raise DamagedArtifact(f"{store.location}/{key}", f"sha256 {named}", f"sha256 {sha256(data)}")
    try:
        return pq.ParquetFile(pa.BufferReader(data)).read().select(drop_schema().names).cast(drop_schema())
    except (pa.ArrowException, KeyError) as error:
        raise DamagedArtifact(f"{store.location}/{key}", "a drop list", str(error)) from error


def read_drop_rows(store: Store) -> pa.Table:
    """The rows of all lists of a stage. Raises DamagedArtifact."""
    import pyarrow as pa

    tables = [read_drop_list(store, key) for key in list_drops(store)]
    return pa.concat_tables(tables) if tables else drop_schema().empty_table()


def read_drops(store: Store) -> Drops:
    """What is down in a stage: the union of its lists. Raises DamagedArtifact."""
    return _read_drops(store.location, tuple(list_drops(store)))


@lru_cache(maxsize=2)
def _read_drops(location: str, keys: tuple[str, ...]) -> Drops:
    # A worker asks again for each of its shards, and a list never changes under its name.
    store = open_store(location)
    both: dict[str, list[Hashes]] = {"uid": [], "url_hash": []}
    for key in keys:
        table = read_drop_list(store, key)
        down = table.filter(_is_for_all(table))
        both["uid"].append(from_hex(table["uid"].to_pylist()))
        both["url_hash"].append(from_hex(down["url_hash"].to_pylist()))
    uids, urls = (np.unique(np.concatenate([np.array([], "S16"), *found])) for found in both.values())
    return Drops(uids, urls)


def _is_for_all(rows: pa.Table) -> Any:
    """The rows that name a URL and no pair: they hold for every pair that has it."""
    import pyarrow.compute as pc

    return pc.is_null(rows["uid"])


def add_drops(store: Store, rows: pa.Table) -> int:
    """Writes those of `rows` (`drop_schema`) that no list of the stage has yet, as one more list; returns how many.

    None: nothing is written. A pair that is down already as a duplicate keeps the pair that stays for it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def names(table: pa.Table) -> Any:
        parts = [pc.fill_null(table[name], "") for name in ("uid", "url_hash", "kind")]
        return pc.binary_join_element_wise(*parts, "/")

    new = rows.filter(pc.invert(pc.is_in(names(rows), pa.chunked_array(names(read_drop_rows(store))))))
    new = new.group_by(new.column_names, use_threads=False).aggregate([]).select(new.column_names)
    if not new.num_rows:
        return 0
    new = new.sort_by([(name, "ascending") for name in new.column_names]).combine_chunks()
    sink = pa.BufferOutputStream()
    pq.write_table(new, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    store.put(f"{DROPS}{sha256(data)}.parquet", data)
    return int(new.num_rows)


def copy_drops(source: Store, into: Store) -> None:
    """Puts the lists of one stage beside those of another; the same bytes under the same names."""
    there = set(list_drops(into))
    for key in list_drops(source):
        if key not in there:
            into.put(key, source.read(key))


def warn_of_drops(tokens: Store) -> str | None:
    """A line if the PAIRS that TOKENS was made of have drops that TOKENS lacks, with what to do; None where they have
    not, or are no longer where they lay."""
    recorded = read_json(tokens, RECIPE).get("places", {}).get("pairs")
    for place in dict.fromkeys(filter(None, (recorded, join(parent(tokens.location), "pairs")))):
        pairs, cure = open_store(place), f"armchair drop {place} {tokens.location}"
        try:
            count = _lacking(pairs, tokens) if _was_made_of(tokens, pairs) else 0
        except (OSError, StorageError) as error:
            return f"whether {place} has drops that {tokens.location} lacks is not known: {error}"
        if count:
            return (
                f"{place} has {count:,} drops that {tokens.location} lacks, and the pictures are trained on. Stop it, "
                f"and run: {cure}"
            )
    return None


def _lacking(pairs: Store, tokens: Store) -> int:
    if set(list_drops(pairs)) <= set(list_drops(tokens)):
        return 0
    ours, theirs = read_drops(pairs), read_drops(tokens)
    both = ((ours.uids, theirs.uids), (ours.urls, theirs.urls))
    return sum(int((~is_among(mine, its)).sum()) for mine, its in both)


def _was_made_of(tokens: Store, pairs: Store) -> bool:
    """As far as the first token shard tells."""
    made = next(iter(sorted(committed_generations(tokens).items())), None)
    if made is None:
        return False
    receipt = read_receipt(tokens, *made)
    return receipt.made_from["pairs"] in {of.digest for of in list_receipts(pairs, receipt.shard)}
