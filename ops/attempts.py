"""Attempt records: who worked on which shard, since when, and how it ended. For people; never read for completion.

    attempts/00012.g0-<attempt id>.json     state running (rewritten every 20 s: a sign of life), then how it ended

A record left in state `running` without a sign of life is an attempt that was killed. Only two decisions look here,
and neither can lose a pair: how often a shard was deferred (ops/ingest.py) and what `armchair status` shows. So a
record that can't be written is told on stderr and decides nothing, but for a deferral's, which is counted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from infra.store import Entry, Store
from ops.reasons import is_transient
from ops.recipes import FORMAT

_log = logging.getLogger(__name__)

HEARTBEAT_S = 20.0
ALIVE_S = 3 * HEARTBEAT_S
"""A running attempt whose record is older than this is dead."""

State = Literal["running", "committed", "already", "deferred", "failed", "died", "interrupted"]
"""`died` is the driver's word about a killed worker; `interrupted` is a cancelled task's own."""

_NAME = re.compile(r"attempts/(\d{5,})\.g(\d+)-([0-9a-f]+)\.json")


@dataclass(frozen=True)
class AttemptName:
    """What the name of a record tells, and when it was last written."""

    shard: int
    generation: int
    entry: Entry


class Attempt:
    """One attempt at one shard, as a `with` block around the work: written at its start, replaced at its end.

    The block calls `end(state, …)`; a block that is left by an exception ends as `failed` with its class and text, or
    as `interrupted` by Ctrl-C or a cancellation.
    `internal` collects tracebacks of pairs that failed inside our own code; `rows_done` shows in the heartbeats.
    """

    def __init__(self, store: Store, stage: str, shard: int, generation: int, run: str = "") -> None:
        self.store = store
        self.started_s = store.clock_s()
        self.rows_done = 0
        self.internal: list[str] = []
        self._monotonic_s = time.monotonic()
        self._record: dict[str, Any] = {
            "format": FORMAT,
            "stage": stage,
            "shard": shard,
            "generation": generation,
            "attempt": secrets.token_hex(6),
            "run": run,
            "state": "running",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self._key = f"attempts/{shard:05d}.g{generation}-{self._record['attempt']}.json"
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self._monotonic_s

    def __enter__(self) -> Attempt:
        self._write()
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            text = "".join(traceback.format_exception(error))
            self.end(
                "failed" if isinstance(error, Exception) else "interrupted",
                error=type(error).__name__,
                text=str(error),
                traceback=text,
            )
        self._ended.set()
        self._heart.join()

    def end(self, state: State, **facts: Any) -> None:
        """Replaces the record by how it ended. Raises OSError only for a deferral that can't be written."""
        self._ended.set()
        with self._lock:
            self._record |= {"state": state, **facts}
            if self.internal:
                self._record["internal"] = self.internal[:20]
            try:
                self._write()
            except OSError as error:
                if state == "deferred":
                    raise  # uncounted it would be deferred for ever
                # The receipt may be written, or a worse error may be on its way out: neither is for a record to change.
                _log.warning("%s: not recorded as %s: %s", self._key, state, error)

    def _write(self) -> None:
        record = {**self._record, "seconds": round(self.seconds, 3), "rows_done": self.rows_done}
        self.store.put(self._key, json.dumps(record, indent=1).encode(), if_absent=False)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with self._lock:
                if not self._ended.is_set():
                    try:
                        self._write()
                    except OSError as error:  # the next beat may get through; without one we would be shown as dead
                        _log.warning("%s: no sign of life: %s", self._key, error)


def list_attempts(store: Store, shard: int | None = None, generation: int | None = None) -> Iterator[AttemptName]:
    """The records of all attempts, or of one shard, or of one generation of it; from one listing, unread."""
    prefix = "attempts/" if shard is None else f"attempts/{shard:05d}."
    for entry in store.list(prefix if generation is None else f"{prefix}g{generation}-"):
        if match := _NAME.fullmatch(entry.key):
            yield AttemptName(int(match[1]), int(match[2]), entry)


def read_attempt(store: Store, name: AttemptName) -> dict[str, Any]:
    """One record. Raises FileNotFoundError if it was swept meanwhile."""
    record: dict[str, Any] = json.loads(store.read(name.entry.key))
    return record


def count_deferrals(store: Store, shard: int, generation: int) -> int:
    """How often this generation of a shard was deferred so far."""
    names = list_attempts(store, shard, generation)
    return sum(read_attempt(store, name)["state"] == "deferred" for name in names)


def deferral_text(rejected: Mapping[str, int], rows: int) -> str:
    """Why a shard was deferred: what its rows, those that were asked for, met that may pass.

    >>> deferral_text({"http_4xx": 1, "connect": 2, "timeout": 5}, 10)
    '7 of 10 rows failed for reasons that may pass: timeout 5, connect 2'
    """
    found = sorted(((count, reason) for reason, count in rejected.items() if is_transient(reason)), reverse=True)
    reasons = ", ".join(f"{reason} {count}" for count, reason in found)
    return f"{sum(count for count, _ in found)} of {rows} rows failed for reasons that may pass: {reasons}"


def record_death(store: Store, stage: str, shard: int, generation: int, run: str, error: BaseException) -> None:
    """The driver's word about a worker that can't say it itself: its running record, or a new one, becomes `died`."""
    facts = {"state": "died", "error": type(error).__name__, "text": str(error)[:2000]}
    try:
        for name in list_attempts(store, shard, generation):
            record = read_attempt(store, name)
            if record["run"] == run and record["state"] == "running":
                store.put(name.entry.key, json.dumps(record | facts, indent=1).encode(), if_absent=False)
                return
    except OSError as failure:  # the driver has other shards to look after
        _log.warning("%s: shard %05d: not recorded as died: %s", store.location, shard, failure)
        return
    attempt = Attempt(store, stage, shard, generation, run)
    attempt.end("died", **{name: value for name, value in facts.items() if name != "state"})
