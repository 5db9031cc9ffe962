"""Digests of list files, remembered beside the plan: a list of tens of GB that did not change is not read every night.

    PAIRS/index/lists.json     label -> stamp and sha256; derived, may be deleted at any time

A digest is believed while the stamp is the same: size, times of the last write and of the last change, and inode; in a
bucket size and time. One that was written to in the last minute is read again next time: a second write in the same
tick of the clock would not show. May not live here: what a digest means (ops/plan.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from infra.store import ObjectPath, Store
from ops.lists import ListPath, Stamp, fingerprint, stamp
from ops.recipes import canonical_json

INDEX = "index/lists.json"
FORMAT = 1
SETTLED_S = 60.0
"""Seconds since the last write after which a stamp is believed."""


@dataclass(frozen=True)
class Digested:
    """A list file, the sha256 and size of its bytes, and the stamp that it had when they were read."""

    path: ListPath
    sha256: str
    bytes: int
    stamp: Stamp


def digest_lists(store: Store, paths: Sequence[ListPath]) -> list[Digested]:
    """The digests of these lists: remembered, or computed and remembered. `store` is that of the plan."""
    remembered = _read(store)
    found, new = [], {}
    for path in paths:
        now = stamp(path.path)
        match remembered.get(path.label):
            case [*was, str(digest)] if tuple(was) == now:
                pass
            case _:
                digest, _, now = fingerprint(path.path)
                if _clock_s(path) - max(now[1:3]) / 1e9 > SETTLED_S:
                    new[path.label] = [*now, digest]
        found.append(Digested(path, digest, now[0], now))
    if new:
        store.put(INDEX, canonical_json({"format": FORMAT, "lists": remembered | new}), if_absent=False)
    return found


def _read(store: Store) -> dict[str, object]:
    try:
        index = json.loads(store.read(INDEX))
        return dict(index["lists"]) if index["format"] == FORMAT else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}  # what can't be read is made anew


def _clock_s(path: ListPath) -> float:
    return path.path.store.clock_s() if isinstance(path.path, ObjectPath) else time.time()
