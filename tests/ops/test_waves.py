"""The driver: a bounded window, one outcome a shard, and deaths that are recorded and not hidden."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.exceptions import RayError

from infra.store import open_store
from ops.attempts import Attempt, list_attempts, read_attempt
from ops.errors import DamagedArtifact
from ops.waves import Actors, ShardOutcome, drive, on_ray

pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Chore:
    """A shard's work that dies as often as it is told to: each death leaves a file."""

    shard: int
    folder: str
    deaths: int = 0
    damage: bool = False
    generation: int = 0
    run: str = "r"


def do_chore(chore: Chore) -> ShardOutcome:
    if chore.damage:
        raise DamagedArtifact("plan/00001.parquet", "ab", "cd")
    with Attempt(open_store(chore.folder), "pairs", chore.shard, 0, chore.run) as attempt:
        for death in range(chore.deaths):
            mark = Path(chore.folder, f"died-{chore.shard}-{death}")
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        attempt.end("committed")
    return ShardOutcome(chore.shard, 0, "committed", rows=1)


@pytest.mark.parametrize("kind", ["task", "actor"])
def test_a_dead_worker_is_recorded_and_its_shard_given_to_another(kind: str, tmp_path: Path, ray_cluster: None) -> None:
    """A task's worker, or the only actor, which three others replace and which costs no other shard an attempt."""
    store = open_store(str(tmp_path))
    deadly = [Chore(0, str(tmp_path)), Chore(1, str(tmp_path), deaths=2), Chore(2, str(tmp_path), deaths=3)]
    chores = [*deadly, Chore(3, str(tmp_path))]
    with Actors(do_chore, "chore", 1) if kind == "actor" else nullcontext(on_ray(do_chore, "chore")) as submit:
        outcomes = {outcome.shard: outcome for outcome in drive(chores, submit, store, "pairs", 2)}
    assert [(outcomes[i].state, outcomes[i].deaths) for i in range(4)] == [
        ("committed", 0),
        ("committed", 2),
        ("failed", 3),
        ("committed", 0),
    ]
    assert outcomes[2].error == {"task": "WorkerCrashedError", "actor": "ActorDiedError"}[kind]
    records = [read_attempt(store, name) for name in list_attempts(store)]
    states = [(record["shard"], record["state"]) for record in records]
    assert sorted(states) == [
        (0, "committed"),
        *[(1, "committed"), (1, "died"), (1, "died")],
        *[(2, "died")] * 3,
        (3, "committed"),
    ]
    assert all(record["pid"] != os.getpid() for record in records), "each death is told in its worker's own record"


def tell_pid(chore: Chore) -> ShardOutcome:
    time.sleep(0.05)
    return ShardOutcome(chore.shard, 0, "committed", text=str(os.getpid()))


def test_actors_stay_and_share_the_shards(tmp_path: Path, ray_cluster: None) -> None:
    chores, store = [Chore(i, str(tmp_path)) for i in range(12)], open_store(str(tmp_path))
    with Actors(tell_pid, "chore", 2) as actors:
        ends = drive(chores, actors, store, "pairs", 2)
        first = next(ends)
        while actors.starting():  # the other is not there yet
            actors.has_room()
            time.sleep(0.01)
        pids = [int(outcome.text) for outcome in (first, *ends)]
    assert len(pids) == 12
    assert len(set(pids)) == 2
    until_s = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/stat").exists() for pid in set(pids)):
        assert time.monotonic() < until_s, "the actors outlive their block"
        time.sleep(0.05)


def test_an_actor_that_finds_no_place_is_given_nothing(tmp_path: Path, ray_cluster: None) -> None:
    chores, store = [Chore(i, str(tmp_path)) for i in range(6)], open_store(str(tmp_path))
    with Actors(tell_pid, "chore", 3, num_cpus=2) as actors:  # of which this Ray has two in all
        outcomes = list(drive(chores, actors, store, "pairs"))
        assert len(actors.starting()) == 2
    assert [outcome.state for outcome in outcomes] == ["committed"] * 6
    assert len({outcome.text for outcome in outcomes}) == 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """Work that kills the process that receives it."""

    def __call__(self, chore: Chore) -> ShardOutcome:
        raise NotImplementedError

    def __reduce__(self) -> tuple[object, ...]:
        return die, ()


def test_actors_that_cannot_start_end_the_run(tmp_path: Path, ray_cluster: None) -> None:
    store = open_store(str(tmp_path))
    with Actors(Deadly(), "chore", 1) as actors, pytest.raises(RayError):
        list(drive([Chore(0, str(tmp_path))], actors, store, "pairs"))
    assert list(list_attempts(store)) == [], "no shard was begun"


def test_a_shard_that_raises_is_an_outcome_and_the_others_go_on(tmp_path: Path, ray_cluster: None) -> None:
    chores = [Chore(i, str(tmp_path), damage=i == 1) for i in range(4)]
    outcomes = list(drive(chores, on_ray(do_chore, "chore"), open_store(str(tmp_path)), "pairs"))
    assert sorted((outcome.shard, outcome.state) for outcome in outcomes) == [
        (0, "committed"),
        (1, "failed"),
        (2, "committed"),
        (3, "committed"),
    ]
    failed = next(outcome for outcome in outcomes if outcome.state == "failed")
    assert (failed.error, failed.text) == ("DamagedArtifact", str(DamagedArtifact("plan/00001.parquet", "ab", "cd")))


def sleep_chore(chore: Chore) -> ShardOutcome:
    time.sleep(0.01)
    return ShardOutcome(chore.shard, 0, "committed")


def test_the_window_bounds_what_is_in_flight(tmp_path: Path, ray_cluster: None) -> None:
    """A plan of 25,000 shards must not become 25,000 references, nor be read ahead."""
    taken = 0

    def plan() -> Iterator[Chore]:
        nonlocal taken
        for i in range(30):
            taken += 1
            yield Chore(i, str(tmp_path))

    done = 0
    for _ in drive(plan(), on_ray(sleep_chore, "chore"), open_store(str(tmp_path)), "pairs", window=4):
        done += 1
        assert taken - done <= 4
    assert done == taken == 30


def wait_for_the_others(chore: Chore) -> ShardOutcome:
    """Shard 0 ends when all others have; each of these leaves a file."""
    if chore.shard:
        Path(chore.folder, f"ended-{chore.shard}").touch()
    until_s = time.monotonic() + 120
    while not chore.shard and len(list(Path(chore.folder).glob("ended-*"))) < STRAGGLED:
        if time.monotonic() > until_s:
            return ShardOutcome(0, 0, "failed")
        time.sleep(0.02)
    return ShardOutcome(chore.shard, 0, "committed")


STRAGGLED = 30


def test_a_straggler_idles_nobody(tmp_path: Path, ray_cluster: None) -> None:
    """It is among the first, and open until every other shard has ended: far more than the window holds."""
    chores = [Chore(i, str(tmp_path)) for i in range(STRAGGLED + 1)]
    submit = on_ray(wait_for_the_others, "chore")
    outcomes = list(drive(chores, submit, open_store(str(tmp_path)), "pairs", window=4))
    assert {outcome.state for outcome in outcomes} == {"committed"}
    assert [outcome.shard for outcome in outcomes][-1] == 0
