"""Waves: how a sharded stage shows in Prefect and on the terminal, and where its Ray can be watched.

A wave is a record of the next shards that ended, not a barrier: the window of Ray tasks in flight runs on across
waves, so a straggler idles nobody. 25,000 shards are 50 task runs; receipts are the only truth about shards.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from infra.cluster import Cluster, connect
from ops.errors import Incomplete
from ops.waves import ShardOutcome


@contextmanager
def on_ray(cluster: Cluster) -> Iterator[None]:
    """`infra.cluster.connect`, and where one can watch it."""
    with connect(cluster) as dashboard:
        if dashboard:
            print(f"{'ray':<12}dashboard {dashboard}", file=sys.stderr, flush=True)
        yield


@dataclass
class Tally:
    """What became of the shards of one run of a stage."""

    planned: int
    states: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    unfinished: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outcome: ShardOutcome) -> None:
        """Counts one shard that ended."""
        self.states[outcome.state] += 1
        if outcome.state in ("committed", "already"):  # what a deferred shard fetched is not on disk
            self.rows += outcome.rows
            self.kept += outcome.kept
            self.rejected.update(outcome.rejected)
        if outcome.state in ("deferred", "failed"):
            why = " ".join(part for part in (outcome.error, outcome.text) if part)
            self.unfinished.append({"shard": outcome.shard, "state": outcome.state, "why": why})

    def as_json(self) -> dict[str, Any]:
        """The counts of this run, for people and for `--json`."""
        return {
            "shards": {"planned": self.planned, **self.states},
            "pairs": {"rows": self.rows, "kept": self.kept, "rejected": dict(self.rejected)},
            "unfinished": self.unfinished,
        }


class Progress:
    """One line to stderr, at most every `every_s` seconds: long work says how far it is and how long it will take."""

    def __init__(self, stage: str, total: int, every_s: float = 5.0) -> None:
        self.stage, self.total, self.every_s = stage, total, every_s
        self.started_s = self.told_s = time.monotonic()

    def tell(self, tally: Tally, *, last: bool = False) -> None:
        """Prints if the last line is old enough, or if this is the last one."""
        now = time.monotonic()
        if not last and now - self.told_s < self.every_s:
            return
        self.told_s = now
        done = sum(tally.states.values())
        seconds = now - self.started_s
        share = f"{100 * tally.kept / tally.rows:.0f} % kept" if tally.rows else ""
        rate = f"{tally.rows / seconds:.0f} pairs/s" if seconds else ""
        left = f"{seconds / done * (self.total - done):.0f} s left" if done and not last else f"{seconds:.0f} s"
        told = "   ".join(part for part in (f"{done}/{self.total} shards", share, rate, left) if part)
        print(f"{self.stage:<12}{told}", file=sys.stderr, flush=True)


def run_in_waves(stage: str, outcomes: Iterator[ShardOutcome], total: int, wave_size: int) -> Tally:
    """Consumes the outcomes of `total` shards, one Prefect task for each `wave_size` of them."""
    tally = Tally(total)
    if not total:
        return tally
    progress = Progress(stage, total)

    def consume() -> dict[str, int]:
        wave: Counter[str] = Counter()
        for outcome in islice(outcomes, wave_size):
            tally.add(outcome)
            wave[outcome.state] += 1
            progress.tell(tally, last=sum(tally.states.values()) == total)
        return dict(wave)

    for first in range(0, total, wave_size):
        name = f"wave-{first:05d}-{min(first + wave_size, total) - 1:05d}"
        task(name="wave", task_run_name=name, persist_result=False, cache_policy=NO_CACHE)(consume)()
    return tally


def raise_if_unfinished(location: str, told: dict[str, Any]) -> None:
    """Raises Incomplete for a stage that ended with shards left, as `Tally.as_json` tells it."""
    if left := told["unfinished"]:
        first = left[0]
        raise Incomplete(location, len(left), f"shard {first['shard']} {first['state']} {first['why']}".strip())


def end_state(location: str, tally: Tally, changed: Sequence[str] = (), **facts: Any) -> Any:
    """The flow's final state: Completed, CompletedWithFailures (deferred or failed shards remain, or lists of a
    watched folder `changed` and were skipped), or Failed (all shards).

    Untyped, because a flow that returns a state gives its caller the state's data (here the tally
    as JSON values, and `facts`).
    """
    told = tally.as_json() | facts
    left = len(tally.unfinished)
    if not left and not changed:
        return Completed(data=told)
    if not left:
        message = f"skipped, because their bytes changed since they were planned: {', '.join(changed)}"
        return Completed(name="CompletedWithFailures", message=message, data=told)
    why = ", ".join(f"{n} {state}" for state, n in tally.states.items() if state in ("deferred", "failed"))
    error = Incomplete(location, left, why)
    if left == tally.planned:
        return Failed(message=str(error), data=error)
    return Completed(name="CompletedWithFailures", message=str(error), data=told)
