"""`status` counts each planned shard once, under what it is, and tells a stage, tokens, a training or a whole run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import ops.status
from infra.store import Entry, LocalStore
from ops.attempts import ALIVE_S, Attempt
from ops.demo_web import DemoWeb, serve
from ops.errors import UsageError
from ops.filters import FilterSettings
from ops.ingest import ingest_shard, start_pairs
from ops.pictures import PictureSettings
from ops.plan import PlanSettings
from ops.run_record import Heartbeat, claim_run, end_run
from ops.status import Memory, status
from pipelines.show import show_status
from tests.ops.conftest import Learned
from tests.pairs import generated, pending, plan, reruns
from tests.small_runs import write_pair_shard


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


def test_what_is_left_is_told_with_its_attempts_over_all_runs_and_its_last_error(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.status, "UNFINISHED", 1)
    plan(store, tmp_path / "list.tsv", [(f"http://127.0.0.1:9/{n}.jpg", f"no one {n}") for n in range(4)], 2)
    for _ in range(2):
        for task in pending(store):
            assert ingest_shard(task).state == "deferred"
    told = status(store)
    assert (told["shards"]["deferred"], len(told["unfinished"])) == (2, 1)
    (left,) = told["unfinished"]
    assert (left["attempts"], left["why"]) == (2, "2 of 2 rows failed for reasons that may pass: connect 2")
    text = show_status(told)
    assert "unfinished shard 0 deferred after 2 attempts: 2 of 2 rows failed" in text
    assert "and 1 more" in text


def test_rates_read_few_records_however_many_shards_ended(
    store: LocalStore, tmp_path: Path, web: DemoWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.status, "EARLIEST", 2)
    plan(store, tmp_path / "list.tsv", generated(web.url, range(8)), pairs_per_shard=1)
    for task in pending(store):
        ingest_shard(task)
    counting = CountingStore(store.root)
    rates = status(counting)["rates"]
    assert sum(key.startswith("attempts/") for key in counting.reads) == 2
    assert rates["pairs_per_s"] == pytest.approx(rates["shards_per_s"], abs=0.01)
    assert rates["shards_per_s"] > 0


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


class CountingStore(LocalStore):
    """A directory that counts what is read from it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []
        self.listings: list[str] = []

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        return super().read(key)

    def list(self, prefix: str = "", *, temporary: bool = False) -> Iterator[Entry]:
        self.listings.append(prefix)
        return super().list(prefix, temporary=temporary)


def test_a_second_look_reads_only_the_receipts_that_are_new(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    """At 25,000 receipts a look that read them all again would be the slowest part of a run on a bucket."""
    plan(store, tmp_path / "list.tsv", generated(web.url, range(12)), pairs_per_shard=3)
    first, *others = pending(store)
    ingest_shard(first)
    counting, memory = CountingStore(store.root), Memory()
    assert status(counting, memory)["pairs"]["kept"] == 3
    for task in others:
        ingest_shard(task)
    counting.reads.clear()
    counting.listings.clear()
    assert status(counting, memory) | {"rates": 0} == status(store) | {"rates": 0}
    assert sorted(key for key in counting.reads if key.startswith("receipts/")) == sorted(
        f"receipts/{task.shard:05d}.g0.json" for task in others
    )
    assert counting.listings.count("receipts/") == 1
    counting.reads.clear()
    status(counting, memory)
    assert counting.reads == [], "nothing has changed"


def test_a_run_tells_each_of_its_stages(learned: Learned) -> None:
    told = status(LocalStore(learned.pairs.parent))
    assert (told["stage"], list(told["stages"])) == ("run", ["pairs", "tokenizer", "tokens", "model"])
    tokens, model = told["stages"]["tokens"], told["stages"]["model"]
    assert tokens["shards"]["planned"] == tokens["shards"]["committed"] == 2
    assert tokens["pairs"]["kept"] == tokens["pairs"]["planned"] == told["stages"]["pairs"]["pairs"]["kept"] == 64
    assert (model["state"], model["step"], model["steps"], model["checkpoint"]) == ("done", 20, 20, 20)
    assert model["evaluation"]["image_nats_per_code"]
    json.dumps(told)


def test_a_run_that_has_only_begun_is_told_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    start_pairs(LocalStore(tmp_path / "pairs"), PlanSettings(), FilterSettings(), PictureSettings())
    assert status(store)["stages"]["pairs"]["shards"]["planned"] == 0


def test_tokens_count_a_pair_shard_that_was_rerun_as_work_that_is_left(tmp_path: Path, learned: Learned) -> None:
    shutil.copytree(learned.pairs, tmp_path / "pairs")
    shutil.copytree(learned.tokens, tmp_path / "tokens")
    write_pair_shard(tmp_path / "pairs", 1, list(range(100, 150)), generation=1)
    told = status(LocalStore(tmp_path / "tokens"))
    assert (told["shards"]["planned"], told["shards"]["committed"], told["shards"]["untried"]) == (2, 1, 1)
    assert (told["pairs"]["planned"], told["pairs"]["kept"]) == (72, 32)
    with Attempt(LocalStore(tmp_path / "tokens"), "tokens", 1, 1, "a run") as attempt:
        told = status(LocalStore(tmp_path / "tokens"))
        assert told["shards"]["running"] == 1
        attempt.end("committed", rows=40)


def test_a_training_is_told_by_its_run_record_and_its_last_checkpoint(tmp_path: Path, learned: Learned) -> None:
    shutil.copytree(learned.tokenizer, tmp_path / "tokenizer")
    store = LocalStore(tmp_path / "tokenizer")
    store.delete("steps/0000020/receipt.json")  # as if it were under way
    run = claim_run(store)
    with Heartbeat(store, run, "worker") as heart:
        heart.facts = {"step": 15, "steps": 20, "loss": 2.5, "steps_per_s": 3.0, "seconds_left": 1.7}
        heart._look_and_put()
        told = status(store)
    assert (told["stage"], told["state"], told["alive"]) == ("tokenizer", "running", True)
    assert (told["step"], told["checkpoint"], told["loss"], told["seconds_left"]) == (15, 10, 2.5, 1.7)
    for who in ("driver", "worker"):
        os.utime(store.root / f"runs/{run:04d}/{who}.json", (1, 1))
    told = status(store)
    assert (told["state"], told["alive"], told["step"]) == ("interrupted", False, 10)
    end_run(store, run, "diverged")
    assert status(store)["state"] == "diverged"
