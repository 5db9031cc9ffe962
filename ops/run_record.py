"""Who trains in a directory: run.json, rewritten every few seconds as a sign of life, read as progress.

Two trainings on one directory would overwrite each other's checkpoints, so a second start is refused while the first
gives signs of life, and a run that finds another's name in the record stops. May not live here: what is trained.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from infra.store import Store
from ops.errors import RunAlive

FORMAT = 1
RUN, STOP = "run.json", "stop.json"
HEARTBEAT_S = 5.0
ALIVE_S = 60.0
"""A record that is older than this is of a dead run, wherever that was."""


def claim_run(store: Store, run: str) -> None:
    """Writes the name of this run into the record. Raises RunAlive if another one's sign of life is young.

    A record of a process of this machine that is gone does not block. Two that start in the same moment both pass
    here; the later name stays in the record, and the other run stops at its first heartbeat.
    """
    alive = read_run(store)
    if alive is not None and alive["state"] == "running" and alive["run"] != run and _may_live(alive):
        raise RunAlive(store.location, f"process {alive['pid']} on {alive['host']}", alive["age_s"])
    store.delete(STOP)
    _put(store, run, "running", {})


def end_run(store: Store, run: str, state: str) -> None:
    """The last word of a run, unless another has taken over meanwhile: "done", "stopped", "diverged" or "failed"."""
    found = read_run(store)
    if found is not None and found["run"] == run:
        facts: dict[str, Any] = {name: found[name] for name in ("step", "steps", "loss") if name in found}
        _put(store, run, state, facts)
    store.delete(STOP)


def ask_to_stop(store: Store, run: str) -> None:
    """Asks a run, wherever it is, to end at its next heartbeat."""
    store.put(STOP, json.dumps({"format": FORMAT, "run": run}).encode(), if_absent=False)


def read_run(store: Store) -> dict[str, Any] | None:
    """The record with `age_s`, the seconds since its last sign of life by the store's clock; None if there is none."""
    entry = store.stat(RUN)
    if entry is None:
        return None
    record: dict[str, Any] = json.loads(store.read(RUN))
    return record | {"age_s": max(0.0, store.clock_s() - entry.modified_s)}


def _may_live(record: dict[str, Any]) -> bool:
    if record["age_s"] > ALIVE_S:
        return False
    if record["host"] != socket.gethostname():
        return True
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put(store: Store, run: str, state: str, facts: dict[str, Any]) -> None:
    record = {
        "format": FORMAT,
        "run": run,
        "state": state,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **facts,
    }
    store.put(RUN, json.dumps(record, indent=1).encode(), if_absent=False)


class Heartbeat:
    """Signs of life in a thread, as a `with` block around the loop. `facts` (progress) go into the record.

    `must_stop` becomes true when the run was asked to stop, or when another run took the directory over
    (`taken_by` then says who).
    """

    def __init__(self, store: Store, run: str) -> None:
        self.facts: dict[str, Any] = {}
        self.must_stop = False
        self.taken_by: dict[str, Any] | None = None
        self._store, self._run = store, run
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._look_and_put()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def raise_if_taken(self) -> None:
        """Raises RunAlive if another run took the directory over."""
        if self.taken_by is not None:
            who = f"process {self.taken_by['pid']} on {self.taken_by['host']}"
            raise RunAlive(self._store.location, who, self.taken_by["age_s"])

    def _beat(self) -> None:
        beaten_s = time.monotonic()
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self._look_and_put()
                beaten_s = time.monotonic()
            except OSError:  # the storage is away for a moment; but a run that gives no sign of life may be replaced
                if time.monotonic() - beaten_s > ALIVE_S / 2:
                    self.must_stop = True

    def _look_and_put(self) -> None:
        found = read_run(self._store)
        if found is not None and found["run"] != self._run:
            self.taken_by, self.must_stop = found, True
            return
        if found is not None and found["state"] != "running":  # its driver has ended already
            self.must_stop = True
            return
        if self._store.stat(STOP) is not None and json.loads(self._store.read(STOP))["run"] == self._run:
            self.must_stop = True
        _put(self._store, self._run, "running", dict(self.facts))
