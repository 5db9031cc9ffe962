"""Who trains in a directory. Each start of workers is a run with a number of its own, and the highest number owns it.

    runs/0003/driver.json   put only if absent: of two that start in the same moment one wins. Then its sign of life
    runs/0003/worker.json   sign of life and progress of rank 0                      runs/0003/stop.json   "end, please"

A second start is refused while the first gives signs of life. A run that finds a higher number stops and writes nothing
more: it may have been frozen, or have lost its driver, while another took over. Each file has one writer, so that one
that wakes up late can't speak in the name of another. May not live here: what is trained.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from infra.store import Store
from ops.errors import RunAlive

FORMAT = 1
RUNS = "runs/"
HEARTBEAT_S = 2.0
ALIVE_S = 60.0
"""A run that has been silent for longer is dead, wherever it was."""
_DRIVER = re.compile(r"runs/(\d{4,})/driver\.json")

Who = Literal["driver", "worker"]


def claim_run(store: Store) -> int:
    """Makes a new run the owner of the directory, and returns its number.

    Raises RunAlive if the run there may be alive: its last sign of life is young, and its driver is no process of this
    machine that is gone. Workers outlive their driver for seconds; the new number is what ends them.
    """
    last = read_run(store)
    if last is not None and last["state"] == "running" and _may_live(last):
        raise _alive(store, last)
    run = last["run"] + 1 if last else 1
    if not store.put(_key(run, "driver"), _record(run, "running", {})):
        raise _alive(store, read_run(store) or {})  # the other of two that started in the same moment
    return run


def end_run(store: Store, run: int, state: str) -> None:
    """The last word of a run's driver: "done", "stopped", "diverged" or "failed"."""
    store.put(_key(run, "driver"), _record(run, state, {}), if_absent=False)


def ask_to_stop(store: Store, run: int) -> None:
    """Asks a run, wherever it is, to end at its next heartbeat."""
    store.put(_key(run, "stop"), json.dumps({"format": FORMAT, "run": run}).encode(), if_absent=False)


def check_owner(store: Store, run: int) -> None:
    """Raises RunAlive if another run owns the directory: asked before each write."""
    if _latest(store) > run:
        raise _alive(store, read_run(store) or {})


def read_run(store: Store) -> dict[str, Any] | None:
    """The record of the latest run; None if nobody ever trained here.

    The driver's words (`run`, `state`, `host`, `pid`), and of its rank 0 the progress and `worker` (`host`, `pid`).
    `age_s` are the seconds since the younger of both signs of life, by the store's clock.
    """
    run = _latest(store)
    return _read(store, run) if run else None


def read_runs(store: Store) -> list[dict[str, Any]]:
    """The records of all runs, in their order."""
    return [_read(store, run) for run in range(1, _latest(store) + 1)]


def describe(record: dict[str, Any]) -> str:
    """Who it is, in words."""
    return f"process {record.get('pid', '?')} on {record.get('host', '?')}"


def _latest(store: Store) -> int:
    return max((int(match[1]) for entry in store.list(RUNS) if (match := _DRIVER.fullmatch(entry.key))), default=0)


def _read(store: Store, run: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(store.read(_key(run, "driver")))
    seen = store.stat(_key(run, "driver"))
    signs = [seen.modified_s] if seen else []
    worker = store.stat(_key(run, "worker"))
    if worker is not None:
        told = json.loads(store.read(_key(run, "worker")))
        signs.append(worker.modified_s)
        record = told | record | {"worker": {name: told[name] for name in ("host", "pid")}}
    return record | {"age_s": max(0.0, store.clock_s() - max(signs, default=0.0))}


def _alive(store: Store, record: dict[str, Any]) -> RunAlive:
    return RunAlive(store.location, describe(record), record.get("age_s", 0.0))


def _may_live(record: dict[str, Any]) -> bool:
    if record["age_s"] > ALIVE_S:
        return False
    return not is_gone(record["host"], record["pid"], record["started"])


def is_gone(host: str, pid: int, started: str | None) -> bool:
    """Whether a process of this machine, as `this_process` told it, is no more. Of another machine nobody knows."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    now = _started(pid)
    return now is None or now != started


def this_process() -> tuple[str, int, str | None]:
    """Host, number and beginning of this process: what tells it from any other for `is_gone`."""
    return socket.gethostname(), os.getpid(), _started(os.getpid())


def _started(pid: int) -> str | None:
    """When a process began, so that another one with its number is not taken for it; None: a corpse nobody took away.
    Where there is no /proc, all begin alike."""
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19] if fields[0] != "Z" else None


def _key(run: int, what: str) -> str:
    return f"{RUNS}{run:04d}/{what}.json"


def _record(run: int, state: str, facts: dict[str, Any]) -> bytes:
    host, pid, started = this_process()
    record = {
        "format": FORMAT,
        "run": run,
        "state": state,
        "host": host,
        "pid": pid,
        "started": started,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **facts,
    }
    return json.dumps(record, indent=1).encode()


class Heartbeat:
    """Signs of life in a thread, as a `with` block around the work of the driver or of rank 0.

    `facts` (progress) go into the record. `must_stop` becomes true when the run was asked to stop, when its driver has
    ended, or when another run took the directory over.
    """

    def __init__(self, store: Store, run: int, who: Who) -> None:
        self.facts: dict[str, Any] = {}
        self.must_stop = False
        self._store, self._run, self._who = store, run, who
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
        if found is None or found["run"] != self._run or found["state"] != "running":
            self.must_stop = True
            return
        self.must_stop = self.must_stop or self._store.stat(_key(self._run, "stop")) is not None
        self._store.put(_key(self._run, self._who), _record(self._run, "running", dict(self.facts)), if_absent=False)
