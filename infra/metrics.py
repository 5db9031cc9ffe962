"""What work costs, in wall time and in CPU time of this process and all its descendants; gauges of a training."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Cost = dict[str, float]
"""{"wall": seconds, "cpu": seconds}"""

Tell = Callable[[str, int, int | None], None]
"""How long work says how far it is: (what is counted, how many are done, of how many or None)."""


def untold(what: str, done: int, total: int | None) -> None:
    """The `Tell` of those whom nobody listens to."""


GAUGES = {
    "loss": ("armchair_train_loss", "Objective, mean over the last interval of the log; nats."),
    "tokens_per_s": ("armchair_train_tokens_per_s", "Tokens (of a tokenizer: codes) a second, over all workers."),
    "waited_share": ("armchair_train_data_wait_share", "Share of the time in which rank 0 waited for data."),
    "step": ("armchair_train_step", "Updates done."),
    "checkpoint_age_s": ("armchair_train_checkpoint_age_s", "Seconds since the last checkpoint was begun."),
}
"""Key of a row of the training's metrics -> (name, description) of its gauge in Ray, which Prometheus scrapes."""


def training_gauges(kind: str, into: str) -> Callable[[dict[str, Any]], None]:
    """A function that is told each row of a training's metrics and sets Ray's gauges, with the tags `kind` and `into`.

    The age of the checkpoint is counted from the last row whose `is_checkpoint` was true.
    """
    from ray.util.metrics import Gauge

    tags = {"kind": kind, "into": into}
    gauges = {key: Gauge(name, description, tuple(tags)) for key, (name, description) in GAUGES.items()}
    checkpoint_s = time.monotonic()

    def tell(row: dict[str, Any]) -> None:
        nonlocal checkpoint_s
        now_s = time.monotonic()
        for key, gauge in gauges.items():
            if (value := (row | {"checkpoint_age_s": now_s - checkpoint_s}).get(key)) is not None:
                gauge.set(float(value), tags)
        if row.get("is_checkpoint"):
            checkpoint_s = now_s

    return tell


LOOK_S = 0.5
"""How often descendants are looked at: what one used after the last look is lost when it ends."""

Usage = dict[tuple[int, str], float]
"""(process, its start time) -> CPU seconds, user and system."""


@contextmanager
def timed(name: str, costs: dict[str, Cost]) -> Iterator[None]:
    """Writes what the `with` block cost into `costs[name]`, also when it raises.

    Processes that end inside the block are counted as of the last look at them: Ray ends its workers without waiting
    for them, so that nobody is told what they used. Where there is no /proc, only this process counts.
    """
    began_s, before = time.monotonic(), family_usage()
    seen, ended = dict(before), threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            seen.update(family_usage())

    watcher = threading.Thread(target=look, name="cpu-time", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        seen.update(family_usage())
        cpu_s = sum(used - before.get(process, 0.0) for process, used in seen.items())
        costs[name] = {"wall": time.monotonic() - began_s, "cpu": cpu_s}


def family_usage() -> Usage:
    """What this process and each of its living descendants has used so far."""
    own = (os.getpid(), "")
    if not Path("/proc/self/stat").exists():
        return {own: time.process_time()}
    found: dict[int, tuple[int, str, float]] = {}
    tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        found[int(path.parent.name)] = (int(fields[1]), fields[19], tick_s * (int(fields[11]) + int(fields[12])))
    family, grew = {os.getpid()}, True
    while grew:
        children = {pid for pid, (parent, _, _) in found.items() if parent in family} - family
        grew = bool(children)
        family |= children
    return {(pid, found[pid][1]): found[pid][2] for pid in family if pid in found}
