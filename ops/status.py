"""How far PAIRS is: shards by state, pairs by reason, attempts that are alive, rates. One read of what lies on disk.

What is committed comes from receipts; what goes on, was deferred or failed comes from attempt records, which are for
people. May not live here: printing (pipelines/cli.py), and proofs (ops/verify.py).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from infra.store import Store
from ops.attempts import ALIVE_S, AttemptName, list_attempts, read_attempt
from ops.errors import UsageError
from ops.plan import read_instalments
from ops.shards import read_receipts

RATE_S = 600.0
"""Rates are taken over attempts that ended in the last ten minutes."""
UNFINISHED = 200
"""At most so many unfinished shards are listed."""


def status(store: Store, *, alive_s: float = ALIVE_S) -> dict[str, Any]:
    """The state of PAIRS as plain JSON values.

    `shards`: planned = committed + running + deferred + failed + interrupted + untried, each shard once: one without a
    receipt is running if an attempt gave a sign of life in the last `alive_s` seconds, else it is what its last
    attempt ended as; interrupted means that its command was killed or cancelled. `pairs`: planned in all, `kept` and
    `rejected` in committed shards. `alive`: attempts under way, reruns included. `unfinished`: the deferred, failed
    and interrupted, with the reason.
    Raises UsageError where nothing is planned.
    """
    instalments = read_instalments(store)
    if not instalments:
        raise UsageError(f"{store.location}: nothing is planned here.", "`armchair ingest LIST --into DIR` begins it.")
    orders = {order.shard: order for instalment in instalments for order in instalment.work_orders}
    receipts = read_receipts(store)
    now_s = store.clock_s()
    last: dict[tuple[int, int], AttemptName] = {}
    attempts: Counter[tuple[int, int]] = Counter()
    recent: list[AttemptName] = []
    for name in list_attempts(store):
        if now_s - name.entry.modified_s <= RATE_S:
            recent.append(name)
        done = receipts.get(name.shard)
        if done is None or name.generation > done.generation:
            at = (name.shard, name.generation)
            attempts[at] += 1
            if at not in last or last[at].entry.modified_s <= name.entry.modified_s:
                last[at] = name
    states = Counter(committed=sum(shard in receipts for shard in orders))
    alive: list[dict[str, Any]] = []
    unfinished: list[dict[str, Any]] = []
    for (shard, generation), name in sorted(last.items()):
        record = read_attempt(store, name)
        state = record["state"]
        silent_s = now_s - name.entry.modified_s
        if state == "running" and silent_s <= alive_s:
            alive.append({**_told(record), "rows_done": record["rows_done"], "silent_s": round(silent_s, 1)})
        elif state == "running":
            state = "interrupted"
        elif state == "died":
            state = "failed"
        elif state in ("committed", "already"):
            state = "untried"  # its receipt is gone: somebody deleted it to have the shard made again
        if generation == 0:
            states[state] += 1
        if state in ("deferred", "failed", "interrupted") and len(unfinished) < UNFINISHED:
            why = record.get("error", "")
            if state == "deferred":
                why = f"{record['transient']} of {record['asked']} rows failed for reasons that may pass"
            tries = attempts[shard, generation]
            unfinished.append({**_told(record), "state": state, "why": why, "attempts": tries})
    names = ("committed", "running", "deferred", "failed", "interrupted")
    shards = {"planned": len(orders)} | {state: states[state] for state in names}
    shards["untried"] = len(orders) - sum(states[state] for state in names)
    rejected: Counter[str] = Counter()
    for receipt in receipts.values():
        rejected.update(receipt.rejected)
    return {
        "location": store.location,
        "instalments": len(instalments),
        "shards": shards,
        "pairs": {
            "planned": sum(order.rows for order in orders.values()),
            "kept": sum(receipt.kept for receipt in receipts.values()),
            "rejected": dict(sorted(rejected.items())),
        },
        "bytes": sum(ref.bytes for receipt in receipts.values() for ref in receipt.files.values()),
        "alive": alive,
        "unfinished": unfinished,
        "rates": _rates(store, recent, now_s),
    }


def _told(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("shard", "generation", "run", "host", "pid", "started")}


def _rates(store: Store, recent: list[AttemptName], now_s: float) -> dict[str, float]:
    """Pairs and shards a second of attempts that ended in the last ten minutes, over the time they span."""
    rows, shards, first_s = 0, 0, now_s
    for name in recent:
        record = read_attempt(store, name)
        if record["state"] in ("committed", "deferred"):
            shards += 1
            rows += record["rows"]
            first_s = min(first_s, name.entry.modified_s - record["seconds"])
    span_s = max(now_s - first_s, 1e-3)
    return {"pairs_per_s": round(rows / span_s, 2), "shards_per_s": round(shards / span_s, 4)}
