"""Removing what nothing names: data files of attempts that died, work orders of planners that lost, half-written files.

Safe beside everything that runs: only files older than the grace time are touched, an attempt older than half of it
does not commit (ops/shards.py), and a commit makes its files young. May not live here: deciding what is damaged.
"""

from __future__ import annotations

from infra.metrics import Tell, untold
from infra.store import Store
from ops.plan import read_instalments
from ops.shards import GRACE_S, list_receipts


def sweep(store: Store, *, grace_s: float = GRACE_S, superseded: bool = False, tell: Tell = untold) -> list[str]:
    """Removes files older than `grace_s` (by the store's clock) that no receipt and no instalment names.

    With `superseded` also the generations below the highest, if that one is older than the grace: models that pinned
    an older generation can't be trained again from it then. A grace below 24 h is safe only while nothing runs here.
    Returns the removed keys. Raises DamagedArtifact, and removes nothing, if a receipt or instalment can't be read:
    it might name anything.
    """
    old_s = store.clock_s() - grace_s
    # Listed before the receipts are read: a file that is committed in between is named by the time we look.
    unnamed = [entry for place in ("data/", "plan/") for entry in store.list(place) if entry.modified_s < old_s]
    unnamed = [entry for entry in unnamed if not entry.key.startswith("plan/part-")]
    leftovers = [entry for entry in store.list(temporary=True) if entry.modified_s < old_s]
    named = {order.key for instalment in read_instalments(store) for order in instalment.work_orders}
    receipts = list_receipts(store)
    highest = {receipt.shard: receipt for receipt in receipts}  # in the order of generations
    removed = []
    for receipt in receipts:
        top = store.stat(highest[receipt.shard].key)
        if superseded and receipt.generation < highest[receipt.shard].generation and top and top.modified_s < old_s:
            store.delete(receipt.key)  # before its data: no receipt may name what is gone
            removed.append(receipt.key)
        else:
            named.update(ref.key for ref in receipt.files.values())
    for looked_at, entry in enumerate([*unnamed, *leftovers], 1):
        tell("old files", looked_at, len(unnamed) + len(leftovers))
        now = store.stat(entry.key)
        if entry.key not in named and now and now.modified_s < old_s:  # perhaps a commit made it young meanwhile
            store.delete(entry.key)
            removed.append(entry.key)
    return removed
