"""Waves: how a sharded stage shows in Prefect and on the terminal, and where its Ray can be watched.

A wave is a record of the next shards that ended, not a barrier: the window of Ray tasks in flight runs on across
waves, so a straggler idles nobody. 25,000 shards are 50 task runs; receipts are the only truth about shards.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from infra.cluster import Cluster, connect
from infra.store import Store, absolute, open_store
from ops.attempts import deferral_text, list_attempts
from ops.contact_sheet import contact_sheet
from ops.encoder import AGREEMENT
from ops.errors import ArmchairError, Incomplete
from ops.shards import read_receipt
from ops.shared import check_shared
from ops.waves import ShardOutcome, ShardTask, Tick, cluster_cpus, rows_under_way, wave_size
from pipelines.artifacts import Board
from pipelines.progress import Progress
from pipelines.show import duration, reasons_of, states_of

NEXT = {
    "deferred": "run the same command again when the web is well; --accept-partial commits with what there is",
    "failed": "mend what the message names, then run the same command again",
    "WorkerCrashedError": "the worker was killed: look for memory and disk of its node, then run the command again",
    "ActorDiedError": "its actor was killed: look for memory and disk of its node, then run the command again",
    "OutOfMemoryError": "fewer fetch.threads or a larger node, then run the same command again",
}
"""What to do about a shard that is left: by the class of its error, else by its state."""


@contextmanager
def on_ray(cluster: Cluster, board: Board, *places: str) -> Iterator[None]:
    """`infra.cluster.connect`, and where one can watch it. Raises NotShared for `places` that not every node sees."""
    with connect(cluster) as dashboard:
        check_shared(*places)
        if dashboard:
            print(f"{'ray':<12}dashboard {dashboard}", file=sys.stderr, flush=True)
            board.link("ray-dashboard", dashboard, "Ray dashboard: tasks, memory, logs of this run, while it runs")
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
    worker_s: float = 0.0
    agreements: list[float] = field(default_factory=list)
    committed: list[tuple[int, int]] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)

    def add(self, outcome: ShardOutcome) -> None:
        """Counts one shard that ended."""
        self.states[outcome.state] += 1
        self.worker_s += outcome.seconds
        if outcome.agreement is not None:
            self.agreements.append(outcome.agreement)
        if outcome.state == "committed" and len(self.committed) < 50:  # enough for a contact sheet
            self.committed.append((outcome.shard, outcome.generation))
        if outcome.state in ("committed", "already"):  # what a deferred shard fetched is not on disk
            self.rows += outcome.rows
            self.kept += outcome.kept
            self.rejected.update(outcome.rejected)
        if outcome.state in ("deferred", "failed"):
            is_deferred = outcome.state == "deferred"
            message = deferral_text(outcome.rejected, outcome.rows) if is_deferred else outcome.text
            row: dict[str, Any] = {"shard": outcome.shard, "generation": outcome.generation, "state": outcome.state}
            row |= {"attempt": outcome.deaths + 1, "class": "transient" if is_deferred else outcome.error}
            self.unfinished.append({**row, "message": message, "next": NEXT.get(outcome.error, NEXT[outcome.state])})

    def count_attempts(self, store: Store) -> None:
        """Which attempt of all runs the last one was, for the shards that are left. One listing."""
        if self.unfinished:
            attempts = Counter((name.shard, name.generation) for name in list_attempts(store))
            for row in self.unfinished:
                row["attempt"] = max(row["attempt"], attempts[row["shard"], row["generation"]])

    def as_json(self) -> dict[str, Any]:
        """The counts of this run, for people and for `--json`."""
        told: dict[str, Any] = {
            "shards": {"planned": self.planned, **self.states},
            "pairs": {"rows": self.rows, "kept": self.kept, "rejected": dict(self.rejected)},
            "unfinished": self.unfinished,
        }
        if self.agreements:
            told["bfloat16"] = {
                "agreement": fmean(self.agreements),
                "lowest": min(self.agreements),
                "shards": len(self.agreements),
                "shards_in_float32": sum(share < AGREEMENT for share in self.agreements),
            }
        return told


def run_in_waves(
    stage: str,
    location: str,
    tasks: Sequence[ShardTask],
    work: Callable[[Tick], Iterator[ShardOutcome]],
    board: Board,
    rows: int | None = None,
) -> Tally:
    """Does the tasks by `work` on the connected Ray, one Prefect task for each wave of them. `rows`: of all tasks."""
    total = len(tasks)
    tally, store = Tally(total), open_store(location)
    if not total:  # no Ray is there then
        return tally
    size = wave_size(cluster_cpus())
    board.progress(0.0, f"0/{total} shards")
    with Progress(stage, always=True, show=board.progress) as progress:

        def tell(under_way: int = 0) -> None:
            progress.tell("shards", sum(tally.states.values()), total)
            progress.tell("pairs", tally.rows + under_way, rows)
            if tally.rows:
                progress.note = f"{100 * tally.kept / tally.rows:.0f} % kept"

        def consume() -> dict[str, int]:
            wave: Counter[str] = Counter()
            for outcome in islice(outcomes, size):
                tally.add(outcome)
                wave[outcome.state] += 1
                tell()
            return dict(wave)

        tell()
        outcomes = work(lambda in_flight: tell(rows_under_way(store, in_flight)))
        for first in range(0, total, size):
            name = f"wave-{first:05d}-{min(first + size, total) - 1:05d}"
            task(name="wave", task_run_name=name, persist_result=False, cache_policy=NO_CACHE)(consume)()
    with suppress(OSError):  # a number for people
        tally.count_attempts(store)
    return tally


def raise_if_unfinished(location: str, told: dict[str, Any]) -> None:
    """Raises Incomplete for a stage that ended with shards left, as `Tally.as_json` tells it."""
    if left := told["unfinished"]:
        first = left[0]
        raise Incomplete(
            location, len(left), f"shard {first['shard']} {first['state']}: {first['class']}, {first['message']}"
        )


def end_state(stage: str, location: str, tally: Tally, board: Board, changed: Sequence[str] = (), **facts: Any) -> Any:
    """The flow's final state: Completed, CompletedWithFailures (deferred or failed shards remain, or lists of a
    watched folder `changed` and were skipped), or Failed (all shards). And the last artifacts.

    Untyped, because a flow that returns a state gives its caller the state's data (here the tally
    as JSON values, and `facts`).
    """
    told = tally.as_json() | facts
    left = len(tally.unfinished)
    if left:
        why = ", ".join(f"{n} {state}" for state, n in tally.states.items() if state in ("deferred", "failed"))
        error = Incomplete(location, left, why)
        message = str(error)
    elif changed:
        message = f"skipped, because their bytes changed since they were planned: {', '.join(changed)}"
    name = "CompletedWithFailures" if left or changed else "Completed"
    if left and left == tally.planned:
        _show_end(stage, location, tally, board, "Failed", changed)
        return Failed(message=message, data=error)
    _show_end(stage, location, tally, board, name, changed)
    return Completed(name=name, message=message if left or changed else None, data=told)


def _show_end(stage: str, location: str, tally: Tally, board: Board, ended: str, changed: Sequence[str]) -> None:
    store = open_store(location)
    board.progress(1.0 if not tally.unfinished else sum(tally.states.values()) / tally.planned, ended)
    board.link("receipts", _address(location, "receipts"), "The receipts: a shard exists if its receipt is there")
    if tally.unfinished:
        records = f"Records: {_address(location, 'attempts')}"
        board.table("unfinished-shards", tally.unfinished, f"armchair status {location} --json. {records}")
    with suppress(OSError, ArmchairError):  # pictures for people: what is committed stays committed without them
        receipts = (read_receipt(store, *at) for at in sorted(tally.committed))
        if stage != "tokenize" and (sheet := contact_sheet(store, receipts)):
            board.picture("pictures", sheet, "The first kept pictures of this run")
    board.markdown("report", report_of(stage, location, tally, ended, changed))


def _address(location: str, name: str) -> str:
    place = absolute(location).rstrip("/")
    return f"{place}/{name}" if "://" in place else f"file://{place}/{name}"


def report_of(stage: str, location: str, tally: Tally, ended: str, changed: Sequence[str]) -> str:
    """A page of Markdown about one run of a stage: what became of shards and pairs, how fast, and what to do next."""
    seconds = time.monotonic() - tally.began_s
    lines = [f"# {stage}: {ended}", f"`{location}`", ""]
    lines += [f"- **shards** {tally.planned} to do: {states_of(dict(tally.states))}"] if tally.planned else []
    if not tally.planned:
        lines += ["- nothing was missing"]
    if tally.rows:
        share = 100 * tally.kept / tally.rows
        lines += [f"- **pairs** {tally.rows:,} judged, {tally.kept:,} kept ({share:.1f} %)"]
        lines += [f"- **rate** {tally.rows / max(seconds, 1e-3):,.4g} pairs/s over {duration(seconds)}"]
        lines += [f"- **cost** {duration(tally.worker_s)} of workers"]
    if half := tally.as_json().get("bfloat16"):
        lines += [f"- **bfloat16** gave {half['agreement']:.3%} of a sample's codes as float32 did"]
        lines[-1] += f" (lowest shard {half['lowest']:.3%})"
    if half and half["shards_in_float32"]:
        lines += [
            f"- **warning** {half['shards_in_float32']} of {half['shards']} shards were encoded in float32, slower"
        ]
        lines[-1] += f": less than {AGREEMENT:.1%} of their sample's codes agreed"
    if tally.rejected:
        lines += ["", "| reason | class | pairs | share |", "|---|---|---:|---:|"]
        for reason, kind, count in reasons_of(dict(tally.rejected)):
            lines.append(f"| {reason} | {kind} | {count:,} | {100 * count / tally.rows:.1f} % |")
    lines += ["", "## What next", ""]
    if tally.unfinished:
        lines += [f"- {len(tally.unfinished)} shards are left: run the same command again, it does only these"]
        lines += [f"- `armchair status {location}` tells why each of them was left"]
    if changed:
        lines += [f"- these lists changed since they were planned; give them another name: {', '.join(changed)}"]
    if any(kind == "transient" for _, kind, _ in reasons_of(dict(tally.rejected))):
        lines += [f"- `armchair rerun {location}` asks again for the pairs that may come"]
    if not tally.unfinished:
        lines += [f"- `armchair verify {location} --deep` proves that every pair is accounted for"]
    return "\n".join(lines)
