"""Taking pairs down by URL or uid: what is asked for is looked up in the stages named and written as drop lists.

A URL is looked up in the sidecars, as the list has it and after redirects; the uids that are found go into each list,
since codes have no URLs, and the URL's hash too, so that it stays down when a later list or rerun brings it again.
Nothing is deleted here: the pictures lie in their shards until the stage is made anew.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from infra.metrics import Tell, untold
from infra.store import Store, object_path
from ops.drops import (
    Drops,
    Hashes,
    Kind,
    add_drops,
    drop_rows,
    from_hex,
    hashes,
    hashes_of_urls,
    is_among,
    read_drop_rows,
    url_hash,
    whole,
)
from ops.errors import UsageError
from ops.find_pairs import find_stages
from ops.reasons import SUCCESS
from ops.shards import Receipt, read_receipts, read_table

if TYPE_CHECKING:
    import pyarrow as pa

_UID = re.compile("[0-9a-f]{32}")
_NONE: Hashes = np.array([], "S16")
_Key = tuple[Literal["url", "uid"], bytes]


@dataclass(frozen=True)
class _Row:
    """A row that was asked for, and by which hash of a URL (b"": by its uid)."""

    uid: bytes
    url: bytes
    is_kept: bool


def drop(
    locations: Sequence[str], urls: str | None, uids: str | None, kind: Kind = "takedown", tell: Tell = untold
) -> dict[str, Any]:
    """Takes down what the files name (a URL or a uid a line, or a Parquet file with that column) in each stage.

    Without a file: what is down in the PAIRS named is taken down in the TOKENS named too. The same call again adds
    nothing, and finishes one that was killed. Raises UsageError for places that hold no pairs and no codes, for a file
    that can't be read, and for URLs where no PAIRS are named.
    """
    stages = find_stages(locations)
    where = ", ".join(locations)
    if not stages.pairs and not stages.tokens:
        raise UsageError(f"{where} holds no pairs and no codes to take down.", "Name PAIRS, TOKENS, or their RUN.")
    if not stages.pairs and not uids:
        what = "codes have no URLs" if urls else "nothing was named that is to go"
        raise UsageError(f"{where}: {what}.", "Name the pairs too: armchair drop PAIRS TOKENS --urls FILE.")
    if not (urls or uids or stages.tokens):
        raise UsageError("nothing was named that is to go.", "Add --urls FILE or --uids FILE, one a line; - for stdin.")
    asked = {**_asked_urls(urls), **_asked_uids(uids)}
    wanted = Drops(_hashes_of(asked, "uid"), _hashes_of(asked, "url"))
    rows = [drop_rows([(None, key) if what == "url" else (key, None) for what, key in asked], kind)]
    if not asked:
        rows = [read_drop_rows(store) for store in stages.pairs]
        wanted = Drops(_NONE, _urls_down(rows))
    found = [_look_up(store, wanted, tell) for store in stages.pairs or stages.tokens]
    rows += [drop_rows([(row.uid, row.url or None) for row in some], kind) for some in found]
    added = {store.location: add_drops(store, _united(rows)) for store in [*stages.pairs, *stages.tokens]}
    seen = {("url", row.url) for some in found for row in some} | {("uid", row.uid) for some in found for row in some}
    kept = {row.uid for some in found for row in some if row.is_kept}
    return {
        "kind": kind,
        "asked": len(asked),
        "found": {"pairs": len({row.uid for some in found for row in some}), "kept": len(kept)},
        "not_found": [name for key, name in asked.items() if key not in seen],
        "added": added,
    }


def _asked_urls(file: str | None) -> dict[_Key, str]:
    return {("url", url_hash(url)): url for url in _lines(file, "url")} if file else {}


def _asked_uids(file: str | None) -> dict[_Key, str]:
    asked: dict[_Key, str] = {}
    for uid in _lines(file, "uid") if file else ():
        if not _UID.fullmatch(uid.lower()):
            raise UsageError(f"{file}: {uid[:80]!r} is no uid.", "A uid has 32 hex digits; URLs are given with --urls.")
        asked["uid", bytes.fromhex(uid)] = uid.lower()
    return asked


def _lines(file: str, column: str) -> list[str]:
    """The lines of a text file (`-`: stdin) or the column of a Parquet file, without empty ones. Raises UsageError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = _bytes_of(file)
    try:
        if data[:4] == b"PAR1":
            values = pq.ParquetFile(pa.BufferReader(data)).read([column])[column].to_pylist()
            lines = [str(value) for value in values if value is not None]
        else:
            lines = data.decode("utf-8-sig").splitlines()
    except (UnicodeDecodeError, pa.ArrowException, KeyError) as error:
        what = f"no Parquet file with a column {column!r}" if data[:4] == b"PAR1" else "no UTF-8 text"
        raise UsageError(
            f"{file} is {what}.", f"Give a text file with a {column} a line, or such a Parquet file."
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"{file} names no {column}.", f"Give a text file with a {column} a line.")
    return found


def _bytes_of(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    return object_path(file).open().read() if "://" in file else Path(file).read_bytes()


def _hashes_of(asked: Iterable[_Key], what: str) -> Hashes:
    return hashes(key for kind, key in asked if kind == what)


def _urls_down(tables: Sequence[pa.Table]) -> Hashes:
    """The URLs that are down for all pairs that have them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = pa.concat_tables(tables)
    return np.unique(from_hex(rows.filter(pc.is_null(rows["uid"]))["url_hash"].to_pylist()))


def _look_up(store: Store, wanted: Drops, tell: Tell) -> list[_Row]:
    """The rows of the newest generations, of whatever status: what failed may come in a rerun."""
    receipts = list(read_receipts(store).values())
    found: list[_Row] = []
    with ThreadPoolExecutor(16) as pool:
        for done, rows in enumerate(pool.map(partial(_look_into, store, wanted), receipts), 1):
            found += rows
            tell("shards searched", done, len(receipts))
    return found


def _look_into(store: Store, wanted: Drops, receipt: Receipt) -> list[_Row]:
    is_of_pairs = receipt.stage == "pairs"
    table = read_table(store, receipt, [*wanted.columns, "status"] if is_of_pairs else ["uid"])
    kept = np.array(
        [status == SUCCESS for status in table["status"].to_pylist()] if is_of_pairs else [True] * len(table)
    )
    uids = from_hex(table["uid"].to_pylist())
    by_uid = np.flatnonzero(is_among(uids, wanted.uids))
    rows = [_Row(whole(uids[row]), b"", bool(kept[row])) for row in by_uid]
    for column in ("url", "final_url") if is_of_pairs and len(wanted.urls) else ():
        urls = hashes_of_urls(table[column].to_pylist())
        hits = np.flatnonzero(is_among(urls, wanted.urls))
        rows += [_Row(whole(uids[row]), whole(urls[row]), bool(kept[row])) for row in hits]
    return rows


def _united(tables: Sequence[pa.Table]) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables(tables)
