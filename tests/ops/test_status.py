"""`status` counts each planned shard once, under what it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.store import LocalStore
from ops.attempts import ALIVE_S, Attempt
from ops.demo_web import DemoWeb, serve
from ops.errors import UsageError
from ops.ingest import ingest_shard
from ops.status import status
from tests.pairs import generated, pending, plan, reruns


@pytest.fixture
def web(tmp_path: Path) -> Iterator[DemoWeb]:
    with serve(tmp_path) as web:
        yield web


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "pairs")


def test_each_shard_is_counted_once_under_what_it_is(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    pairs = [*generated(web.url, range(20)), *((f"{web.url}/hostile/missing/{i}", f"no picture {i}") for i in range(4))]
    plan(store, tmp_path / "list.tsv", pairs, pairs_per_shard=4)
    tasks = {task.shard: task for task in pending(store)}
    assert status(store)["shards"] == {
        "planned": 6, "committed": 0, "running": 0, "deferred": 0, "failed": 0, "interrupted": 0, "untried": 6,
    }  # fmt: skip

    ingest_shard(tasks[0])
    web.outage = True
    ingest_shard(tasks[1])
    web.outage = False
    store.put(tasks[2].work_order.key, b"torn", if_absent=False)
    with pytest.raises(Exception, match="damaged"):
        ingest_shard(tasks[2])
    with pytest.raises(KeyboardInterrupt), Attempt(store, "pairs", 5, 0, "a run"):
        raise KeyboardInterrupt
    with Attempt(store, "pairs", 3, 0, "a run"):  # left without an end: what a kill leaves
        pass
    killed = next(store.root.glob("attempts/00003.*"))
    os.utime(killed, (store.clock_s() - ALIVE_S - 1,) * 2)
    with Attempt(store, "pairs", 4, 0, "another run") as attempt:
        attempt.rows_done = 7
        told = status(store)
    assert told["shards"] == {
        "planned": 6, "committed": 1, "running": 1, "deferred": 1, "failed": 1, "interrupted": 2, "untried": 0,
    }  # fmt: skip
    assert [(alive["shard"], alive["run"], alive["pid"]) for alive in told["alive"]] == [
        (4, "another run", os.getpid())
    ]
    assert [(left["shard"], left["state"]) for left in told["unfinished"]] == [
        (1, "deferred"), (2, "failed"), (3, "interrupted"), (5, "interrupted"),
    ]  # fmt: skip
    assert told["pairs"]["planned"] == 24
    assert told["pairs"]["kept"] + sum(told["pairs"]["rejected"].values()) == 4
    assert told["rates"]["pairs_per_s"] > 0
    assert told["bytes"] == sum(path.stat().st_size for path in store.root.glob("data/*"))


def test_a_rerun_that_was_killed_is_told_though_its_shard_is_committed(
    store: LocalStore, tmp_path: Path, web: DemoWeb
) -> None:
    pairs = [*generated(web.url, range(3)), (f"{web.url}/hostile/broken/1", "a picture that never comes")]
    plan(store, tmp_path / "list.tsv", pairs)
    for task in pending(store):
        ingest_shard(task)
    (task,) = reruns(store)
    with Attempt(store, "pairs", task.shard, task.generation, task.run):
        pass
    os.utime(next(store.root.glob("attempts/00000.g1-*")), (1, 1))
    told = status(store)
    assert (told["shards"]["committed"], told["shards"]["interrupted"]) == (1, 0)
    assert [(left["generation"], left["state"]) for left in told["unfinished"]] == [(1, "interrupted")]


def test_status_of_a_place_without_a_plan_says_how_to_begin(store: LocalStore) -> None:
    with pytest.raises(UsageError, match="armchair ingest"):
        status(store)
