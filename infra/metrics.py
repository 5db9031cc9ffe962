"""What a stretch of work cost, in wall time and in CPU time of this process and all its descendants."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Cost = dict[str, float]
"""{"wall": seconds, "cpu": seconds}"""


@contextmanager
def timed(name: str, costs: dict[str, Cost]) -> Iterator[None]:
    """Writes what the `with` block cost into `costs[name]`, also when it raises."""
    wall_s, cpu_s = time.monotonic(), tree_cpu_s()
    try:
        yield
    finally:
        costs[name] = {"wall": time.monotonic() - wall_s, "cpu": tree_cpu_s() - cpu_s}


def tree_cpu_s() -> float:
    """CPU seconds, user and system, of this process and all its descendants, ended ones that were waited for included.

    Reads /proc; where there is none, this process and its ended children.
    """
    if not Path("/proc/self/stat").exists():
        return sum(os.times()[:4])
    ticks: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile; its parent counts it
        ticks[int(path.parent.name)] = (int(fields[1]), sum(map(int, fields[11:15])))
    family, grew = {os.getpid()}, True
    while grew:
        children = {pid for pid, (parent, _) in ticks.items() if parent in family} - family
        grew = bool(children)
        family |= children
    return sum(ticks[pid][1] for pid in family if pid in ticks) / os.sysconf("SC_CLK_TCK")
