"""Rounds of SIGKILL against an ingest on Ray, at random moments: of a worker, of the driver, of Ray's `raylet`, of
Prefect's `server`, or of the `machine`: the driver with all that it started at once. (Workers outlive their driver long
enough to commit a small shard.)

A round waits until the server counted a request that was made after the round began, then a random time, then kills.
Every second round also waits for a first receipt, so that there is something that could be fetched again. When all
shards are committed before the rounds are over, a fresh directory with fresh pictures is taken. What is killed
(`Driver`) is shared with the rounds against trainings (tests/training_rounds.py).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.cluster import REPO
from infra.store import LocalStore, Store, open_store
from ops.attempts import list_attempts, read_attempt
from ops.demo_web import DemoWeb
from ops.plan import read_instalments, read_work_order
from ops.shards import committed_generations, receipt_key
from tests.pairs import assert_conserved, generated, plan

PATIENCE_S = 120.0


class Requests:
    """When each path of a server was asked for last, by the clock that also stamps receipts."""

    def __init__(self, web: DemoWeb) -> None:
        self.url = web.url
        self.last_s: dict[str, float] = {}
        self._count = web.count
        web.count = self._noted  # type: ignore[method-assign]

    def _noted(self, path: str) -> int:
        self.last_s[path] = time.time()
        return self._count(path)

    def last_of(self, url: str) -> float:
        return self.last_s.get(url.removeprefix(self.url).partition("?")[0], 0.0)


@dataclass
class Ground:
    """One planned directory, and the list that it was planned from."""

    store: Store
    path: Path
    pairs: list[tuple[str, str]]

    @classmethod
    def new(
        cls,
        folder: Path,
        web: DemoWeb,
        number: int,
        shards: int,
        pairs_per_shard: int,
        delay_ms: int,
        within: str | None = None,
    ) -> Ground:
        """`within`: where the directory is to lie, if not in `folder`."""
        first = number * shards * pairs_per_shard
        pairs = generated(web.url, range(first, first + shards * pairs_per_shard), delay_ms)
        store, path = open_store(f"{within or folder}/pairs-{number}"), folder / f"list-{number}.tsv"
        plan(store, path, pairs, pairs_per_shard)
        return cls(store, path, pairs)

    def assert_whole(self, requests: Requests) -> None:
        """Every pair is there once, and none was asked for after the receipt of its shard."""
        assert_conserved(self.store, self.pairs)
        grain_s = 0.0 if isinstance(self.store, LocalStore) else 1.0  # a bucket's clock tells whole seconds
        for order in (order for part in read_instalments(self.store) for order in part.work_orders):
            receipt = self.store.stat(receipt_key(order.shard, 0))
            assert receipt is not None
            for url in read_work_order(self.store, order)["url"].to_pylist():
                late_s = requests.last_of(url) - receipt.modified_s
                assert late_s < grain_s, (
                    f"{url} was fetched again {late_s:.3f} s after the receipt of shard {order.shard}"
                )


class Driver:
    """A program under fire: a process of its own session, and the Ray that it started."""

    def __init__(self, program: str, *arguments: str | Path, log: Path | None = None) -> None:
        command = [sys.executable, "-m", program, *map(str, arguments)]
        with (log or Path(os.devnull)).open("ab") as out:
            self.process = subprocess.Popen(command, cwd=REPO, stdout=out, start_new_session=True)
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

    def named(self, *words: str) -> list[int]:
        """Process ids of the living members of the family that have one of the words in their command line."""
        found = []
        for pid in self.living(list(self.family)):
            with contextlib.suppress(OSError):
                if any(word in Path(f"/proc/{pid}/cmdline").read_text() for word in words):
                    found.append(pid)
        return found

    def workers(self, store: Store) -> list[int]:
        """Process ids of living Ray workers of this driver that are at a shard, by their attempt records."""
        pids = [record["pid"] for record in map(lambda name: read_attempt(store, name), list_attempts(store))
                if record["state"] == "running"]  # fmt: skip
        return self.living(pids)

    def living(self, pids: list[int]) -> list[int]:
        """Those of some process ids that are of this driver's family, and alive."""
        return [pid for pid in pids if pid in self.family and is_alive(pid, self.family[pid])]

    def end(self) -> None:
        """Ends the driver and what is left of its Ray and its Prefect."""
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


@dataclass
class Rounds:
    """What `kill_rounds` did: kills while a shard was open, kills after a first receipt, directories used."""

    open: int = 0
    met: int = 0
    directories: int = 0


def our_driver(ground: Ground, log: Path) -> Driver:
    """The ingest of a planned directory without Prefect."""
    return Driver("tests.ingest_driver", ground.store.location, log=log)


def kill_rounds(
    folder: Path,
    web: DemoWeb,
    victims: list[str],
    shards: int,
    pairs_per_shard: int,
    *,
    delay_ms: int,
    seed: int,
    start: Callable[[Ground, Path], Driver] = our_driver,
    within: str | None = None,
) -> Rounds:
    """Kills once for each of `victims`, then runs to the end. `start` starts a driver that writes to a log.

    Raises AssertionError if a pair is lost or doubled, or one of a committed shard is asked for again; also if no kill
    met a committed shard, or most of them no open one, which would prove little.
    """
    chance, done = random.Random(seed), Rounds()
    requests = Requests(web)
    number, driver, log = itertools.count(), None, folder / "log"

    def new() -> Ground:
        done.directories += 1
        return Ground.new(folder, web, next(number), shards, pairs_per_shard, delay_ms, within)

    ground = new()
    waiting = list(victims)
    try:
        while waiting:
            driver = driver or start(ground, log)
            is_late = (len(victims) - len(waiting)) % 2 == 1
            strike = Strike.at(driver, ground.store, web, waiting[0], chance, is_late=is_late)
            if strike is None:
                assert driver.process.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
                driver = driver.end()
                if len(committed_generations(ground.store)) == shards:
                    ground.assert_whole(requests)
                    ground = new()
                continue
            done.met += strike.committed > 0
            done.open += strike.was_open
            if waiting.pop(0) != "worker":
                # Without its Ray or its Prefect a driver must come to an end by itself.
                driver.process.wait(PATIENCE_S)
                driver = driver.end()
        while len(committed_generations(ground.store)) < shards:  # again where three deaths left a shard open
            driver = driver or start(ground, log)
            assert driver.process.wait(PATIENCE_S) in (0, 5), log.read_text()[-3000:]
            driver = driver.end()
        ground.assert_whole(requests)
        assert done.met, "no kill met a committed shard"
        assert done.open >= len(victims) / 2, f"only {done.open} of {len(victims)} kills met an open shard"
        return done
    finally:
        if driver is not None:
            driver.end()


@dataclass(frozen=True)
class Strike:
    """One kill: how many shards were committed when it was made, and whether an attempt at one was under way."""

    committed: int
    was_open: bool

    @classmethod
    def at(
        cls, driver: Driver, store: Store, web: DemoWeb, victim: str, chance: random.Random, *, is_late: bool
    ) -> Strike | None:
        """Kills after a request of this round (`is_late`: and a first receipt); None if the driver ended before."""
        begun, give_up_s = sum(web.counts().values()), time.monotonic() + PATIENCE_S
        while sum(web.counts().values()) == begun or (is_late and not committed_generations(store)):
            if driver.process.poll() is not None:
                return None
            assert time.monotonic() < give_up_s, "no request was made, or no shard committed"
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.8))
        while driver.process.poll() is None:
            driver.note_family()
            workers = driver.workers(store)
            # The server of Prefect is a uvicorn, and so is nothing else here.
            words = {"raylet": "raylet/raylet", "server": "uvicorn"}.get(victim)
            found = driver.named(words) if words else workers if victim == "worker" else [driver.process.pid]
            if found:
                strike = cls(len(committed_generations(store)), bool(workers))
                for pid in [chance.choice(found)] if victim == "worker" else found:
                    kill(pid)
                for pid in driver.family if victim == "machine" else ():
                    kill(pid)
                return strike
            time.sleep(0.005)
        return None
