"""Rounds of SIGKILL against an ingest on Ray, at random moments: of a worker, of the driver, or of the `machine`: the
driver with all of its Ray at once. (Workers outlive their driver long enough to commit a small shard.)

A round waits until the server counted a request that was made after the round began, then a random time, then kills.
When all shards are committed before the rounds are over, a fresh directory with fresh pictures is taken.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from infra.cluster import REPO
from infra.store import LocalStore
from ops.attempts import list_attempts, read_attempt
from ops.demo_web import DemoWeb
from ops.plan import read_instalments, read_work_order
from ops.shards import committed_generations
from tests.pairs import assert_conserved, generated, plan

PATIENCE_S = 120.0


@dataclass
class Ground:
    """One planned directory, and how often each pair of its committed shards had been asked for when that was seen."""

    store: LocalStore
    pairs: list[tuple[str, str]]
    asked: dict[int, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def new(cls, folder: Path, web: DemoWeb, number: int, shards: int, pairs_per_shard: int, delay_ms: int) -> Ground:
        first = number * shards * pairs_per_shard
        pairs = generated(web.url, range(first, first + shards * pairs_per_shard), delay_ms)
        store = LocalStore(folder / f"pairs-{number}")
        plan(store, folder / f"list-{number}.tsv", pairs, pairs_per_shard)
        return cls(store, pairs)

    def note_committed(self, web: DemoWeb) -> None:
        """Remembers the counts of shards whose receipt is seen for the first time."""
        orders = {order.shard: order for part in read_instalments(self.store) for order in part.work_orders}
        for shard in committed_generations(self.store).keys() - self.asked.keys():
            self.asked[shard] = counts_of(read_work_order(self.store, orders[shard])["url"].to_pylist(), web)

    def assert_whole(self, web: DemoWeb) -> None:
        """Every pair is there once, and none of a committed shard was asked for again."""
        assert_conserved(self.store, self.pairs)
        self.note_committed(web)
        for shard, before in self.asked.items():
            after = counts_of([f"{web.url}{path}" for path in before], web)
            assert after == before, f"shard {shard} had a receipt and was fetched again"


def counts_of(urls: list[str], web: DemoWeb) -> dict[str, int]:
    counts = web.counts()
    paths = [url.removeprefix(web.url).partition("?")[0] for url in urls]
    return {path: counts.get(path, 0) for path in paths}


class Driver:
    """The ingest under fire: a process of its own session, and the Ray that it started."""

    def __init__(self, store: LocalStore) -> None:
        command = [sys.executable, "-m", "tests.ingest_driver", str(store.root)]
        self.process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, start_new_session=True)
        self.family: dict[int, str] = {}

    def note_family(self) -> None:
        """Remembers the descendants by process id and start time, to end them when their driver is gone."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and (known := birth(int(entry.name))):
                parents[int(entry.name)] = known
        family = {self.process.pid}
        while more := {pid for pid, (parent, _) in parents.items() if parent in family} - family:
            family |= more
        self.family |= {pid: parents[pid][1] for pid in family if pid in parents and pid != self.process.pid}

    def workers(self, store: LocalStore) -> list[int]:
        """Process ids of living Ray workers of this driver that are at a shard, by their attempt records."""
        pids = [record["pid"] for record in map(lambda name: read_attempt(store, name), list_attempts(store))
                if record["state"] == "running"]  # fmt: skip
        return [pid for pid in pids if pid in self.family and is_alive(pid, self.family[pid])]

    def end(self) -> None:
        """Ends the driver and what is left of its Ray."""
        self.note_family()
        self.process.kill()
        self.process.wait()
        deadline_s = time.monotonic() + 5  # Ray's processes share the fate of their driver
        while time.monotonic() < deadline_s and any(is_alive(*member) for member in self.family.items()):
            time.sleep(0.05)
        for member in self.family.items():
            if is_alive(*member):
                kill(member[0])


def birth(pid: int) -> tuple[int, str] | None:
    """(parent, start time) of a process, or None where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None
    return (int(fields[1]), fields[19]) if fields[0] != "Z" else None


def is_alive(pid: int, started: str) -> bool:
    known = birth(pid)
    return known is not None and known[1] == started


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_rounds(
    folder: Path, web: DemoWeb, victims: list[str], shards: int, pairs_per_shard: int, *, delay_ms: int, seed: int
) -> int:
    """Kills once for each of `victims`, then runs to the end; returns how many directories were used.

    Raises AssertionError if a pair is lost or doubled, or one of a committed shard is asked for again.
    """
    chance = random.Random(seed)
    number, driver = 0, None
    ground = Ground.new(folder, web, number, shards, pairs_per_shard, delay_ms)
    waiting = list(victims)
    try:
        while waiting:
            if driver is None:
                driver = Driver(ground.store)
            if not strike(driver, ground.store, web, waiting[0], chance):
                assert driver.process.wait() == 0
                driver.end()
                driver = None
                if len(committed_generations(ground.store)) == shards:
                    ground.assert_whole(web)
                    number += 1
                    ground = Ground.new(folder, web, number, shards, pairs_per_shard, delay_ms)
                continue
            if waiting.pop(0) != "worker":
                driver.end()
                driver = None
            ground.note_committed(web)
        while len(committed_generations(ground.store)) < shards:  # again where three deaths left a shard open
            driver = driver or Driver(ground.store)
            assert driver.process.wait(PATIENCE_S) == 0
            driver.end()
            driver = None
        ground.assert_whole(web)
        return number + 1
    finally:
        if driver is not None:
            driver.end()


def strike(driver: Driver, store: LocalStore, web: DemoWeb, victim: str, chance: random.Random) -> bool:
    """One kill; False if the driver ended by itself before it could be made."""
    begun, give_up_s = sum(web.counts().values()), time.monotonic() + PATIENCE_S
    while sum(web.counts().values()) == begun:
        if driver.process.poll() is not None:
            return False
        assert time.monotonic() < give_up_s, "no request was made"
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.8))
    driver.note_family()
    if victim != "worker":
        kill(driver.process.pid)
        for member in driver.family if victim == "machine" else ():
            kill(member)
        return driver.process.wait() == -signal.SIGKILL
    while driver.process.poll() is None:
        if workers := driver.workers(store):
            kill(chance.choice(workers))
            return True
        time.sleep(0.005)
        driver.note_family()
    return False
