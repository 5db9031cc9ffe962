"""How far a stage or a run is: shards by state, pairs by reason, steps of a training, who is alive, rates, time left.

What is committed comes from receipts and checkpoints; what goes on, was deferred or failed comes from attempt records
and run records, which are for people. A `Memory` makes looking again cheap: what can't have changed is not read twice,
and an index (ops/receipt_index.py) makes the first look of the next command cheap.
May not live here: printing (pipelines/show.py, pipelines/watch.py), and proofs (ops/verify.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from infra.store import Store, join, open_store
from ops.attempts import ALIVE_S, AttemptName, deferral_text, list_attempts, read_attempt
from ops.errors import UsageError
from ops.plan import INSTALMENT, PLAN, Instalment, read_instalments
from ops.receipt_index import ReceiptIndex, Summary
from ops.recipes import RECIPE, read_json
from ops.run_record import ALIVE_S as TRAINING_ALIVE_S
from ops.run_record import read_run
from ops.snapshot import source_fingerprint
from ops.trained import latest_checkpoint, read_metrics

STAGES = ("pairs", "tokenizer", "tokens", "model")
"""The directories of a run, in the order of the work."""
RATE_S = 600.0
"""Rates are taken over shards that ended in the last ten minutes."""
EARLIEST = 16
"""Of so many attempts, the first to end of these, the start is looked up: a rate counts from the first one's start."""
UNFINISHED = 200
"""At most so many unfinished shards are listed."""


@dataclass
class Memory:
    """What earlier looks have read and nobody rewrites: receipts, instalments, attempt records of the same time."""

    indices: dict[str, ReceiptIndex] = field(default_factory=dict)
    instalments: dict[str, tuple[int, list[Instalment]]] = field(default_factory=dict)
    attempts: dict[tuple[str, str], tuple[float, dict[str, Any]]] = field(default_factory=dict)
    evaluations: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def read_receipts(self, store: Store) -> dict[int, Summary]:
        """Shard -> what its receipt of the highest generation says: one listing, and a read for each that is new."""
        return self.indices.setdefault(store.location, ReceiptIndex(store)).look()

    def read_instalments(self, store: Store) -> list[Instalment]:
        """The plan; read again only when it has grown."""
        parts = sum(1 for entry in store.list(f"{PLAN}part-") if INSTALMENT.fullmatch(entry.key))
        known = self.instalments.get(store.location)
        if known is None or known[0] != parts:
            known = self.instalments[store.location] = parts, read_instalments(store)
        return known[1]

    def read_attempts(self, store: Store, names: Iterable[AttemptName]) -> Iterator[tuple[AttemptName, dict[str, Any]]]:
        """The records of these attempts, in their order; not of those that were swept meanwhile."""

        def read(name: AttemptName) -> dict[str, Any] | None:
            at = (store.location, name.entry.key)
            if at not in self.attempts or self.attempts[at][0] != name.entry.modified_s:
                try:
                    self.attempts[at] = name.entry.modified_s, read_attempt(store, name)
                except FileNotFoundError:
                    return None
            return self.attempts[at][1]

        wanted = list(names)
        with ThreadPoolExecutor(16) as pool:
            for name, record in zip(wanted, pool.map(read, wanted), strict=True):
                if record is not None:
                    yield name, record

    def last_evaluation(self, store: Store, step: int) -> dict[str, Any]:
        """The last evaluation up to the checkpoint at `step`; empty if there is none."""
        at = (store.location, step)
        if at not in self.evaluations:
            found = [row for row in read_metrics(store) if row["kind"] == "evaluation"]
            self.evaluations[at] = found[-1] if found else {}
        return self.evaluations[at]


def status(store: Store, memory: Memory | None = None) -> dict[str, Any]:
    """The state of PAIRS, TOKENS, a trained stage or a RUN as plain JSON values; `stage` says which of them it is.

    A run holds `stages`: name -> the state of each that was begun. Raises UsageError for a place that is none of them.
    """
    memory = memory or Memory()
    if store.stat(RECIPE) is None:
        parts = {name: open_store(join(store.location, name)) for name in STAGES}
        stages = {name: status(part, memory) for name, part in parts.items() if part.stat(RECIPE) is not None}
        if stages:
            return {"stage": "run", "location": store.location, "stages": stages}
        if not memory.read_instalments(store):
            what = f"{store.location}: nothing is planned here."
            raise UsageError(what, "`armchair ingest LIST --into DIR` begins it.")
        return _of_pairs(store, memory)
    stage = read_json(store, RECIPE)["stage"]
    if stage == "pairs":
        return _of_pairs(store, memory)
    if stage == "tokens":
        return _of_tokens(store, memory)
    return _of_training(store, memory)


def _of_pairs(store: Store, memory: Memory) -> dict[str, Any]:
    """The state of PAIRS.

    `shards`: planned = committed + running + deferred + failed + interrupted + untried, each shard once: one without a
    receipt is running if an attempt gave a sign of life in the last minute, else it is what its last
    attempt ended as; interrupted means that its command was killed or cancelled. `pairs`: planned in all, `kept` and
    `rejected` in committed shards. `alive`: attempts under way, reruns included. `unfinished`: the deferred, failed
    and interrupted, with the reason. `seconds_left` is None while nothing is under way.
    """
    instalments = memory.read_instalments(store)
    receipts = memory.read_receipts(store)
    rows = {shard: receipt.rows for shard, receipt in receipts.items()}
    rows |= {order.shard: order.rows for instalment in instalments for order in instalment.work_orders}
    told = {"stage": "pairs", "location": store.location, "instalments": len(instalments)}
    return told | _sharded(store, memory, rows.keys(), receipts, frozenset(), rows)


def _of_tokens(store: Store, memory: Memory) -> dict[str, Any]:
    """The state of TOKENS, in the words of `_of_pairs`; a pair is a picture that was kept.

    What is planned are the shards of the PAIRS they are made from, where these lie beside it (as in a run); elsewhere
    `planned` are the shards that were tried. A shard is `stale` when its pair shard has a later generation.
    """
    receipts = memory.read_receipts(store)
    pairs = _pairs_beside(store)
    sources = memory.read_receipts(pairs) if pairs else {}
    tried = {name.shard for name in list_attempts(store)}
    stale = {n for n, source in sources.items() if n in receipts and receipts[n].made_from != source.digest}
    rows = {shard: source.kept for shard, source in sources.items()}
    told = {"stage": "tokens", "location": store.location, "of": pairs.location if pairs else None}
    return told | _sharded(store, memory, rows.keys() | receipts.keys() | tried, receipts, stale, rows)


def _pairs_beside(store: Store) -> Store | None:
    """The PAIRS in the directory beside TOKENS, if the tokens were made from them."""
    parent = store.location.rstrip("/").rpartition("/")[0]
    pairs = open_store(join(parent, "pairs") if parent else "pairs")
    if pairs.stat(RECIPE) is None or source_fingerprint(pairs) != read_json(store, RECIPE)["inputs"]["pairs"]:
        return None
    return pairs


def _of_training(store: Store, memory: Memory) -> dict[str, Any]:
    """The state of a trained stage: what its run record and its last checkpoint say.

    `state` is running, done, stopped, diverged or failed; `running` without a sign of life for a minute is
    `interrupted`; `untried` has no run record. `step` is where it is, `checkpoint` the step that a resume starts from.
    """
    recipe, record, latest = read_json(store, RECIPE), read_run(store), latest_checkpoint(store)
    steps = recipe["identity"][f"{recipe['stage']}_training"]["steps"]
    checkpoint = latest.step if latest else None
    told: dict[str, Any] = {"stage": recipe["stage"], "location": store.location, "state": "untried", "steps": steps}
    told |= {"step": checkpoint or 0, "checkpoint": checkpoint, "digest": latest.digest if latest else None}
    told |= {"evaluation": memory.last_evaluation(store, latest.step) if latest else {}}
    if record is not None:
        state = record["state"]
        if state == "running" and record["age_s"] > TRAINING_ALIVE_S:
            state = "interrupted"
        told |= {"state": state, "alive": state == "running", "silent_s": round(record["age_s"], 1)}
        told |= {name: record[name] for name in ("host", "pid", "loss") if name in record}
        if told["alive"]:
            told |= {name: record[name] for name in ("step", "steps_per_s", "seconds_left") if name in record}
    if checkpoint is not None and checkpoint >= steps:
        told["state"] = "done"
    return told


def _sharded(
    store: Store,
    memory: Memory,
    planned: Iterable[int],
    receipts: dict[int, Summary],
    stale: AbstractSet[int],
    rows: dict[int, int],
) -> dict[str, Any]:
    """What `_of_pairs` and `_of_tokens` have in common; `rows` is what each shard has, where it is known.

    A shard whose receipt is `stale` counts as one that has none.
    """
    shards, now_s = set(planned), store.clock_s()
    current = {shard: receipt for shard, receipt in receipts.items() if shard not in stale}
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
    states = Counter(committed=sum(shard in current for shard in shards))
    alive: list[dict[str, Any]] = []
    unfinished: list[dict[str, Any]] = []
    ended: list[tuple[float, int]] = []
    for name, record in memory.read_attempts(store, (last[at] for at in sorted(last))):
        shard, generation, state = name.shard, name.generation, record["state"]
        if state == "deferred":
            ended.append((name.entry.modified_s, record["rows"]))
        silent_s = now_s - name.entry.modified_s
        if state == "running" and silent_s <= ALIVE_S:
            row = {"rows_done": record["rows_done"], "rows": rows.get(shard), "silent_s": round(silent_s, 1)}
            alive.append({**_told(record), **row})
        elif state == "running":
            state = "interrupted"
        elif state == "died":
            state = "failed"
        elif state in ("committed", "already"):
            state = "untried"  # its receipt is gone: somebody deleted it to have the shard made again
        if shard in shards and shard not in current:
            states[state] += 1
        if state in ("deferred", "failed", "interrupted") and len(unfinished) < UNFINISHED:
            why = " ".join(filter(None, (record.get("error"), record.get("text"))))
            if state == "deferred":
                why = deferral_text(record["rejected"], record["asked"])
            tries = attempts[shard, generation]
            unfinished.append({**_told(record), "state": state, "why": why, "attempts": tries})
    names = ("committed", "running", "deferred", "failed", "interrupted")
    counted = {"planned": len(shards)} | {state: states[state] for state in names}
    counted["untried"] = len(shards) - sum(states[state] for state in names)
    rejected: Counter[str] = Counter()
    for receipt in current.values():
        for reason, count in receipt.rejected.items():
            rejected[reason] += count
    ended += [(summary.listed_s, summary.rows) for summary in receipts.values()]
    rates = _rates(store, memory, ended, alive, recent, now_s)
    left = sum(count for shard, count in rows.items() if shard not in current)
    left -= sum(attempt["rows_done"] for attempt in alive if attempt["shard"] not in current)
    return {
        "shards": counted,
        "pairs": {
            "planned": sum(rows.values()),
            "kept": sum(receipt.kept for receipt in current.values()),
            "rejected": dict(sorted(rejected.items())),
        },
        "bytes": sum(receipt.bytes for receipt in current.values()),
        "alive": alive,
        "unfinished": unfinished,
        "rates": rates,
        "seconds_left": round(left / rates["pairs_per_s"]) if alive and rates["pairs_per_s"] and left > 0 else None,
    }


def _told(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("shard", "generation", "run", "host", "pid", "started")}


def _rates(
    store: Store,
    memory: Memory,
    ended: Iterable[tuple[float, int]],
    alive: Iterable[dict[str, Any]],
    recent: list[AttemptName],
    now_s: float,
) -> dict[str, float]:
    """Pairs and shards a second in the last ten minutes: of shards that `ended` (when, rows) then, and of what is done
    of those alive, over the time since the first of the `recent` attempts began. Few records are read for it."""
    counted = [rows for at_s, rows in ended if now_s - at_s <= RATE_S]
    rows = sum(counted) + sum(attempt["rows_done"] for attempt in alive)
    earliest = sorted(recent, key=lambda name: name.entry.modified_s)[:EARLIEST]
    starts = [name.entry.modified_s - record["seconds"] for name, record in memory.read_attempts(store, earliest)]
    span_s = max(now_s - min(starts, default=now_s - RATE_S), 1e-3)
    return {"pairs_per_s": round(rows / span_s, 2), "shards_per_s": round(len(counted) / span_s, 4)}
