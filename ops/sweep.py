"""Removing what nothing names: data files of attempts that died, work orders of planners that lost, half-written files.
And what can be spared: of a committed shard all attempt records but the last one of each generation; derived files.

Safe beside everything that runs: only files older than the grace time are touched, an attempt older than half of it
does not commit (ops/shards.py), and a commit makes its files young. May not live here: deciding what is damaged.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from infra.metrics import Tell, untold
from infra.store import Entry, Store
from ops.attempts import list_attempts
from ops.plan import read_instalments
from ops.receipt_index import INDEX
from ops.shards import GRACE_S, list_receipts


def sweep(store: Store, *, grace_s: float = GRACE_S, superseded: bool = False, tell: Tell = untold) -> list[str]:
    """Removes files older than `grace_s` (by the store's clock) that no receipt and no instalment names.

    With `superseded` also the generations below the highest, if that one is older than the grace: models that pinned
    an older generation can't be trained again from it then. The records of a shard that is not committed stay, for its
    deferrals are counted. A grace below 24 h is safe only while nothing runs here.
    Returns the removed keys. Raises DamagedArtifact, and removes nothing, if a receipt or instalment can't be read:
    it might name anything.
    """
    old_s = store.clock_s() - grace_s
    # Listed before the receipts are read: a file that is committed in between is named by the time we look.
    unnamed = [entry for place in ("data/", "plan/") for entry in store.list(place) if entry.modified_s < old_s]
    unnamed = [entry for entry in unnamed if not entry.key.startswith("plan/part-")]
    leftovers = [entry for entry in store.list(temporary=True) if entry.modified_s < old_s]
    named = {key for instalment in read_instalments(store) for key in instalment.keys}
    receipts = list_receipts(store)
    highest = {receipt.shard: receipt for receipt in receipts}  # in the order of generations
    removed = []
    for receipt in receipts:
        top = highest[receipt.shard]
        at = store.stat(top.key) if superseded and receipt.generation < top.generation else None
        if at and at.modified_s < old_s:
            store.delete(receipt.key)  # before its data: no receipt may name what is gone
            removed.append(receipt.key)
        else:
            named.update(ref.key for ref in receipt.files.values())
    past = [*unnamed, *leftovers, *_past_attempts(store, highest.keys(), old_s), *store.list(INDEX)]
    for looked_at, entry in enumerate(past, 1):
        tell("old files", looked_at, len(past))
        now = store.stat(entry.key)
        if entry.key not in named and now and now.modified_s < old_s:  # perhaps a commit made it young meanwhile
            store.delete(entry.key)
            removed.append(entry.key)
    return removed


def _past_attempts(store: Store, committed: AbstractSet[int], old_s: float) -> list[Entry]:
    """Old records of committed shards, but the last one of each generation, which `why` and `status` tell. A nightly
    rerun of a shard that never changes would make more and more of them."""
    last: dict[tuple[int, int], Entry] = {}
    past = []
    for name in list_attempts(store):
        if name.shard not in committed:
            continue
        at = (name.shard, name.generation)
        entries = sorted((name.entry, last.get(at, name.entry)), key=lambda entry: entry.modified_s)
        last[at] = entries[1]
        if entries[0] is not entries[1] and entries[0].modified_s < old_s:
            past.append(entries[0])
    return past
