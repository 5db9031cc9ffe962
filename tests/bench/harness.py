"""The harness of all benchmarks: sides that take turns in one run, their clocks, the table, and the last line.

    A B A B …       a machine that slows down, or is shared, slows all sides down; a ratio of one run stays
    CPU-seconds     of the side's own process (all threads) and of its children that ended; wall time beside it
    medians         of at least 3 rounds; the spread is printed
    last line       {"stage", "device", "ratios": {…}, …}: ratios of CPU-seconds, above 1 where ours is faster

A side is a callable that works once and returns `Measured`: `measured` for work in this process, `OwnProcess` for work
whose process must not be shared (another environment, other imports, one CPU of its own).
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUNDS = 5


@dataclass(frozen=True)
class Measured:
    """What one round of one side made, and what it took."""

    made: Any
    cpu_s: float
    wall_s: float


def measured(work: Callable[..., Any], *arguments: Any) -> Measured:
    """Runs `work` here, once."""
    wall_s, cpu_s = time.perf_counter(), _cpu_s()
    made = work(*arguments)
    return Measured(made, _cpu_s() - cpu_s, time.perf_counter() - wall_s)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class OwnProcess:
    """A side's process: fresh, bound to one CPU, alive for all rounds, so that its imports are in no round.

    `start_up_cpu_s` is what they cost: the CPU of the process from its birth to the end of `prepare`.
    """

    def __init__(self, cpu: int, environment: Mapping[str, str], prepare: Callable[[], Any]) -> None:
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_settle, initargs=(cpu, dict(environment))
        )
        self._prepare = prepare
        self.start_up_cpu_s = 0.0

    def __enter__(self) -> OwnProcess:
        self.run(self._prepare)
        self.start_up_cpu_s = self._pool.submit(_cpu_s).result()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def run(self, work: Callable[..., Any], *arguments: Any) -> Measured:
        """Runs `work`, a function of a module, in the process; what it raises is raised here."""
        return self._pool.submit(measured, work, *arguments).result()


def _settle(cpu: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.sched_setaffinity(0, {cpu})


def alternate(sides: Mapping[str, Callable[[], Measured]], rounds: int = ROUNDS) -> dict[str, list[Measured]]:
    """All sides in turn, `rounds` times; side -> its rounds."""
    if rounds < 3:
        raise ValueError(f"a median of {rounds} rounds says nothing; at least 3 are needed")
    turns: dict[str, list[Measured]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            turns[name].append(side())
    return turns


def cpu_s(turns: Sequence[Measured]) -> float:
    """Median of a side's rounds, in CPU-seconds."""
    return statistics.median(turn.cpu_s for turn in turns)


def device(*packages: str) -> str:
    """The machine and the versions that decide speed, in one line."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    machine = f"{_cpu_model()}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return ", ".join(part for part in (machine, versions, f"load average {load}") if part)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def print_table(turns: Mapping[str, Sequence[Measured]], things: int, name: str) -> None:
    """One line a side: CPU and wall for one of the `things` that each round makes, and the spread of the CPU."""
    width = max(map(len, turns))
    print(f"{'':{width}}  CPU-ms a {name}  (lowest - highest)  {name}s a CPU-s  wall ms")
    for side, rounds in turns.items():
        each = [1000 * turn.cpu_s / things for turn in rounds]
        middle, wall_ms = statistics.median(each), statistics.median(1000 * turn.wall_s / things for turn in rounds)
        spread = f"({min(each):.2f} - {max(each):.2f})"
        a, b = len(f"CPU-ms a {name}"), len(f"{name}s a CPU-s")
        print(f"{side:{width}}  {middle:{a}.2f}  {spread:>18}  {1000 / middle:{b}.1f}  {wall_ms:7.2f}")


def print_last_line(stage: str, where: str, ratios: Mapping[str, float], **more: Any) -> None:
    """The JSON object that scripts read."""
    line = {"stage": stage, "device": where, "ratios": dict(ratios), **more}
    print(json.dumps(_rounded(line)), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value
