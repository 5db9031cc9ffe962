"""Ingestion keeps its promise: every pair once, the same bytes for the same pictures, and outages wait."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

import ops.ingest
from infra.cluster import REPO
from infra.store import LocalStore, Store, open_store
from ops.attempts import count_deferrals, list_attempts, read_attempt
from ops.demo_web import DemoWeb, serve
from ops.errors import DamagedArtifact, RecipeChanged
from ops.filters import FilterSettings
from ops.ingest import OutageSettings, ingest, ingest_shard, start_pairs
from ops.plan import PlanSettings, read_instalments
from ops.shards import Receipt, read_receipts, tar_members
from ops.waves import ShardOutcome
from tests.kills import Ground, Requests, kill_rounds
from tests.pairs import (
    FETCH,
    FILTERS,
    PICTURE,
    assert_conserved,
    generated,
    pending,
    plan,
    reruns,
    rows,
    statuses,
)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[DemoWeb]:
    with serve(tmp_path) as web:
        yield web


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "pairs")


def run_here(store: Store, **changed: object) -> list[ShardOutcome]:
    return [ingest_shard(task) for task in pending(store, **changed)]


def test_each_pair_is_kept_or_rejected_under_its_reason_and_opens_as_webdataset(
    store: LocalStore, tmp_path: Path, web: DemoWeb
) -> None:
    hostile = {
        f"{web.url}/hostile/{kind}/1": status
        for kind, status in {
            "missing": "http_4xx",
            "heals": "success",
            "broken": "http_5xx",
            "html": "not_an_image",
            "private_redirect": "redirect_forbidden",
            "truncated": "truncated",
            "corrupt": "decode",
            "bomb": "pixels_too_many",
            "sideways": "success",
            "transparent": "success",
        }.items()
    }
    pairs = [
        *generated(web.url, range(30)),
        *((url, f"a caption of {url}") for url in hostile),
        ("no url", "a picture"),
    ]
    pairs.append((f"{web.url}/generated/99.jpg", ""))
    plan(store, tmp_path / "list.tsv", pairs)
    (outcome,) = run_here(store)
    assert outcome.state == "committed"
    assert_conserved(store, pairs)
    found = statuses(store)
    assert {url: found[url] for url in hostile} == hostile
    assert found[f"{web.url}/generated/99.jpg"] == "caption_missing"
    assert web.counts().get("/generated/99.jpg", 0) == 0, "a pair that the plan rejected is not fetched"

    (receipt,) = read_receipts(store).values()
    tar = store.root / receipt.files["tar"].key
    data = tar.read_bytes()
    members = {name: data[at : at + size] for name, at, size in tar_members(tar)}
    assert outcome.kept == len(members) / 3 == 33
    for row in rows(store):
        if row["status"] == "success":
            jpeg = data[row["tar_offset"] : row["tar_offset"] + row["jpg_size"]]
            assert members[f"{row['key']}.jpg"] == jpeg
            assert members[f"{row['key']}.txt"].decode() == row["caption"]
            described = json.loads(members[f"{row['key']}.json"])
            assert (described["uid"], described["width"], described["sha256"]) == (
                row["uid"],
                row["width"],
                row["sha256"],
            )
            assert min(row["width"], row["height"]) == PICTURE.short_side_px


def test_tar_and_sidecar_are_equal_with_1_and_32_threads_and_shuffled_latencies(tmp_path: Path, web: DemoWeb) -> None:
    delays = np.random.default_rng(0).integers(0, 30, 48)
    pairs = [pair for i in range(48) for pair in generated(web.url, range(i, i + 1), delay_ms=int(delays[i]))]
    pairs += [(f"{web.url}/hostile/{kind}/1", f"a caption of {kind}") for kind in ("missing", "corrupt", "broken")]
    files = []
    for threads in (1, 32):
        store = LocalStore(tmp_path / f"pairs-{threads}")
        plan(store, tmp_path / "list.tsv", pairs)
        run_here(store, fetch=replace(FETCH, threads=threads, connections_per_host=32))  # all are of one host
        (receipt,) = read_receipts(store).values()
        assert receipt.kept == 48
        files.append(receipt.files)
    assert files[0] == files[1], "content-addressed names and digests differ"


def test_a_second_run_has_nothing_to_do_and_asks_nobody(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    pairs = generated(web.url, range(20))
    plan(store, tmp_path / "list.tsv", pairs, pairs_per_shard=8)
    tasks = pending(store)
    assert [outcome.state for outcome in map(ingest_shard, tasks)] == ["committed"] * 3
    asked = web.counts()
    assert pending(store) == []
    assert [outcome.state for outcome in map(ingest_shard, tasks)] == ["already"] * 3
    assert web.counts() == asked


def test_a_shard_met_by_an_outage_waits_and_commits_when_the_web_is_well(
    store: LocalStore, tmp_path: Path, web: DemoWeb
) -> None:
    pairs = generated(web.url, range(12))
    plan(store, tmp_path / "list.tsv", pairs)
    web.outage = True
    (outcome,) = run_here(store)
    assert (outcome.state, outcome.rejected) == ("deferred", {"http_5xx": 12})
    assert read_receipts(store) == {}
    web.outage = False
    assert [outcome.state for outcome in run_here(store)] == ["committed"]
    assert_conserved(store, pairs)
    assert set(statuses(store).values()) == {"success"}


def test_deferring_ends_after_max_deferrals_or_when_partial_shards_are_accepted(
    store: LocalStore, tmp_path: Path, web: DemoWeb
) -> None:
    pairs = [(f"{web.url}/hostile/broken/{i}", f"a picture, number {i}") for i in range(8)]
    plan(store, tmp_path / "list.tsv", pairs, pairs_per_shard=4)
    patient = OutageSettings(max_deferrals=2)
    states = [[outcome.state for outcome in run_here(store, outage=patient)] for _ in range(2)]
    assert states == [["deferred"] * 2] * 2
    assert [count_deferrals(store, shard, 0) for shard in (0, 1)] == [2, 2]
    first = min(pending(store, outage=patient), key=lambda task: task.shard)
    assert ingest_shard(first).state == "committed"
    assert [outcome.state for outcome in run_here(store, accept_partial=True)] == ["committed"]
    assert_conserved(store, pairs)


def test_a_share_of_transient_rows_within_the_limit_commits(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    pairs = generated(web.url, range(4)) + [(f"{web.url}/hostile/broken/{i}", f"a picture {i}") for i in range(4)]
    plan(store, tmp_path / "list.tsv", pairs)
    assert [outcome.state for outcome in run_here(store)] == ["committed"]
    assert_conserved(store, pairs)


def test_what_is_left_at_the_shards_deadline_is_timeout(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    pairs = generated(web.url, range(30), delay_ms=200)
    plan(store, tmp_path / "list.tsv", pairs)
    fetch = replace(FETCH, threads=2)
    hurried = OutageSettings(shard_deadline_s=0.7, max_transient=1)
    (outcome,) = run_here(store, fetch=fetch, outage=hurried)
    assert outcome.state == "committed"
    assert outcome.kept + outcome.rejected["timeout"] == 30
    assert outcome.kept < 30
    assert sum(web.counts().values()) < 30
    assert_conserved(store, pairs)


def test_a_bug_of_ours_that_one_picture_meets_costs_one_row_and_leaves_its_traceback(
    store: LocalStore, tmp_path: Path, web: DemoWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes) -> object:
        if data == poison:
            raise ZeroDivisionError("a bug")
        return read_header(data)

    from ops.demo_web import jpeg

    poison, read_header = jpeg(3), ops.ingest.read_header
    monkeypatch.setattr(ops.ingest, "read_header", broken)
    pairs = generated(web.url, range(6))
    plan(store, tmp_path / "list.tsv", pairs)
    (outcome,) = run_here(store)
    assert (outcome.kept, outcome.rejected) == (5, {"internal": 1})
    assert_conserved(store, pairs)
    (attempt,) = [read_attempt(store, name) for name in list_attempts(store)]
    assert "ZeroDivisionError: a bug" in attempt["internal"][0]
    assert "/generated/3.jpg" in attempt["internal"][0]


def test_rerun_asks_only_for_transient_rows_and_copies_what_was_kept_byte_for_byte(
    store: LocalStore, tmp_path: Path, web: DemoWeb
) -> None:
    healing = [(f"{web.url}/hostile/heals_later/{i}", f"a shy picture, number {i}") for i in range(12)]
    others = [(f"{web.url}/hostile/{kind}/1", f"a caption of {kind}") for kind in ("missing", "corrupt")]
    pairs = [*generated(web.url, range(26)), *healing, *others]  # 30 % are 503, and heal
    plan(store, tmp_path / "list.tsv", pairs, pairs_per_shard=20)
    run_here(store)
    first = read_receipts(store)
    before, kept_before = web.counts(), kept_bytes(store)
    assert sum(receipt.rejected.get("http_5xx", 0) for receipt in first.values()) == 12

    while tasks := reruns(store):  # heals_later: three 503 in all, two requests a run
        assert {ingest_shard(task).state for task in tasks} == {"committed"}
    asked = {path for path, count in web.counts().items() if count > before[path]}
    assert asked == {f"/hostile/heals_later/{i}" for i in range(12)}
    assert_conserved(store, pairs)
    assert all(statuses(store)[url] == "success" for url, _ in healing)
    after = kept_bytes(store)
    assert {uid: after[uid] for uid in kept_before} == kept_before
    assert all(
        receipt.made_from["generation"] == first[shard].digest
        for shard, receipt in read_receipts(store).items()
        if receipt.generation == 1
    )


def kept_bytes(store: LocalStore) -> dict[str, list[bytes]]:
    """uid -> its three files."""
    kept: dict[str, list[bytes]] = {}
    uids = {row["key"]: row["uid"] for row in rows(store)}
    for receipt in read_receipts(store).values():
        tar = store.root / receipt.files["tar"].key
        data = tar.read_bytes()
        for name, at, size in tar_members(tar):
            kept.setdefault(uids[name.partition(".")[0]], []).append(data[at : at + size])
    return kept


def test_a_rerun_that_changes_nothing_spends_no_generation(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    pairs = [*generated(web.url, range(4)), (f"{web.url}/hostile/broken/1", "a picture that never comes")]
    plan(store, tmp_path / "list.tsv", pairs)
    run_here(store)
    first = read_receipts(store)
    (outcome,) = map(ingest_shard, reruns(store))
    assert (outcome.state, outcome.kept, outcome.rejected) == ("already", first[0].kept, first[0].rejected)
    assert read_receipts(store) == first
    assert reruns(store, shards=[5]) == []


def test_a_rerun_of_all_rejected_rows_in_an_outage_forgets_no_reason(
    store: LocalStore, tmp_path: Path, web: DemoWeb
) -> None:
    pairs = [*generated(web.url, range(4)), (f"{web.url}/hostile/missing/1", "a picture that is gone")]
    plan(store, tmp_path / "list.tsv", pairs)
    run_here(store)
    assert reruns(store) == [], "nothing transient"
    web.outage = True
    (task,) = reruns(store, again="rejected")
    assert ingest_shard(task).state == "already"
    assert web.counts()["/hostile/missing/1"] > 1
    assert statuses(store)[f"{web.url}/hostile/missing/1"] == "http_4xx"


def test_the_loser_of_a_rerun_stops(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    pairs = [*generated(web.url, range(4)), (f"{web.url}/hostile/heals_later/1", "a shy picture")]
    plan(store, tmp_path / "list.tsv", pairs)
    run_here(store)
    (task,) = reruns(store)
    assert ingest_shard(task).state == "committed"
    asked = web.counts()
    assert ingest_shard(task).state == "already"
    assert web.counts() == asked


def test_two_ingests_at_once_lose_and_double_nothing(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    pairs = generated(web.url, range(60), delay_ms=5)
    plan(store, tmp_path / "list.tsv", pairs, pairs_per_shard=3)
    both = [pending(store), pending(store)]
    start = threading.Barrier(2)

    def one(tasks: list) -> list[str]:  # type: ignore[type-arg]
        start.wait()
        return [ingest_shard(task).state for task in tasks]

    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(one, both))
    assert {state for run in states for state in run} <= {"committed", "already"}
    assert_conserved(store, pairs)
    assert len(read_receipts(store)) == 20
    assert sum(web.counts().values()) < 1.5 * len(pairs), "each run has its own order and looks before it fetches"


@pytest.mark.parametrize("generation", [0, 1])
def test_the_loser_of_a_race_tells_what_stands_in_the_store(
    store: LocalStore, tmp_path: Path, web: DemoWeb, monkeypatch: pytest.MonkeyPatch, generation: int
) -> None:
    pairs = [*generated(web.url, range(4)), (f"{web.url}/hostile/heals_later/1", "a shy picture")]
    plan(store, tmp_path / "list.tsv", pairs)
    if generation:
        run_here(store)
    (task,) = reruns(store) if generation else pending(store)
    rival = Receipt("pairs", 0, generation, {"work_order": "ab"}, rows=5, kept=2, rejected={"http_5xx": 2, "decode": 1})

    class Overtaken(LocalStore):
        """Another attempt, with less luck on the web, commits while our files are uploaded."""

        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            if key.startswith("data/"):
                super().put(rival.key, rival.to_json())
            return super().put(key, data, if_absent=if_absent)

    monkeypatch.setattr(ops.ingest, "open_store", lambda location: Overtaken(Path(location)))
    outcome = ingest_shard(task)
    assert (outcome.state, outcome.kept, outcome.rejected) == ("already", 2, {"decode": 1, "http_5xx": 2})
    assert store.read(rival.key) == rival.to_json()


def test_a_shard_whose_record_can_not_be_written_is_committed(
    store: LocalStore, tmp_path: Path, web: DemoWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(LocalStore):
        """The disk is full once the receipt is written."""

        def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
            if key.startswith("attempts/") and any(self.list("receipts/")):
                raise OSError("No space left on device")
            return super().put(key, data, if_absent=if_absent)

    pairs = generated(web.url, range(4))
    plan(store, tmp_path / "list.tsv", pairs)
    (task,) = pending(store)
    monkeypatch.setattr(ops.ingest, "open_store", lambda location: Full(Path(location)))
    assert ingest_shard(task).state == "committed"
    assert_conserved(store, pairs)


def test_a_plan_extended_while_a_wave_runs_keeps_the_wave_and_adds_the_rest(
    store: LocalStore, tmp_path: Path, web: DemoWeb
) -> None:
    old, new = generated(web.url, range(20)), generated(web.url, range(100, 120))
    plan(store, tmp_path / "list.tsv", old, pairs_per_shard=7)
    tasks = pending(store)
    ingest_shard(tasks[0])
    plan(store, tmp_path / "a-list-that-sorts-earlier.tsv", new, pairs_per_shard=7)
    for task in tasks[1:]:
        ingest_shard(task)
    assert_conserved(store, old)
    later = pending(store)
    assert {task.shard for task in later}.isdisjoint(task.shard for task in tasks)
    for task in later:
        ingest_shard(task)
    assert_conserved(store, old + new)
    assert set(web.counts().values()) == {1}


def test_a_damaged_work_order_fails_its_shard_in_words(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    plan(store, tmp_path / "list.tsv", generated(web.url, range(4)))
    (task,) = pending(store)
    store.put(task.work_order.key, b"torn", if_absent=False)
    with pytest.raises(DamagedArtifact, match="plan/00000"):
        ingest_shard(task)
    (attempt,) = [read_attempt(store, name) for name in list_attempts(store)]
    assert (attempt["state"], attempt["error"]) == ("failed", "DamagedArtifact")
    assert "Traceback" in attempt["traceback"]


def test_other_filters_on_the_same_pairs_are_refused_with_was_and_now(store: LocalStore) -> None:
    start_pairs(store, PlanSettings(), FILTERS, PICTURE)
    start_pairs(store, PlanSettings(), FILTERS, PICTURE)
    with pytest.raises(RecipeChanged, match="drop list") as refused:
        start_pairs(store, PlanSettings(), FilterSettings(min_side_px=100), PICTURE)
    assert f"filters.min_side_px: was {FILTERS.min_side_px}, now 100" in str(refused.value)


def _disturbed(tmp_path: Path, web: DemoWeb, *ways: str) -> list[dict[str, Any]]:
    """What tests/ops/kill_each_write.py tells of a shard of six pairs; all of its directories end whole."""
    pairs = generated(web.url, range(6))
    store = LocalStore(tmp_path / "planned")
    plan(store, tmp_path / "list.tsv", pairs)
    program = [sys.executable, "-m", "tests.ops.kill_each_write"]
    done = subprocess.run(
        [*program, str(store.root), str(tmp_path / "rounds"), f"{web.url}/_counts", *ways],
        capture_output=True,
        cwd=REPO,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    for each in rounds:
        assert each["then"] == ("already" if each["had_receipt"] else "committed"), each
        assert each["asked_again"] == (0 if each["had_receipt"] else len(pairs)), each
        assert_conserved(LocalStore(Path(each["store"])), pairs)
    return rounds


@pytest.mark.slow
def test_a_kill_before_or_after_each_write_of_a_shard_loses_nothing(tmp_path: Path, web: DemoWeb) -> None:
    """tar, sidecar, receipt and attempt record: each fsync, link, replace and directory of them."""
    kills = _disturbed(tmp_path, web, "before", "after")
    assert len(kills) >= 2 * 3 * 3, "three files, each synced, linked and its directory synced; before and after"
    assert {kill["killed_by"] for kill in kills} == {signal.SIGKILL}
    assert any(kill["had_receipt"] for kill in kills), "a kill after the receipt's link leaves a whole shard"


@pytest.mark.slow
def test_a_frozen_worker_whose_shard_was_done_by_another_changes_nothing_when_it_wakes_up(
    tmp_path: Path, web: DemoWeb
) -> None:
    frozen = _disturbed(tmp_path, web, "freeze")
    assert {each["killed_by"] for each in frozen} == {0}
    # Equal bytes count as its own: it can't tell whose receipt it finds.
    assert {each["first"] for each in frozen} <= {"committed", "already"}
    assert sum(not each["had_receipt"] for each in frozen) >= 9, "at each write of tar, sidecar and receipt"


@pytest.mark.slow
def test_a_write_that_fails_or_lies_and_a_clock_that_jumps_commit_nothing_and_are_named(
    tmp_path: Path, web: DemoWeb
) -> None:
    rounds = _disturbed(tmp_path, web, "EIO", "ENOSPC", "short", "clock")
    names = {
        "EIO": "Input/output error",
        "ENOSPC": "No space left",
        "short": "vanished|was cut",
        "clock": r"took 13\.0 h",
    }
    for each in rounds:
        assert each["killed_by"] == 0, each
        if each["first"] == "raised":
            assert re.search(names[each["how"]], each["text"]), each
            if each["how"] in ("short", "clock"):  # on a disk that takes nothing no record can be written either
                store = LocalStore(Path(each["store"]))
                records = [read_attempt(store, name) for name in list_attempts(store)]
                assert [record["state"] for record in records if record.get("text") == each["text"]] == ["failed"]
        else:  # the disturbed write was of no importance, or it came after the receipt
            assert each["had_receipt"], each
    raised = Counter(each["how"] for each in rounds if each["first"] == "raised")
    assert set(raised) == set(names)
    assert raised["EIO"] >= 9, "three files, each synced, linked, and its directory synced"
    assert raised["short"] == 3, "tar, sidecar and receipt"


def test_the_kill_rounds_see_a_pair_that_is_fetched_after_the_receipt_of_its_shard(
    tmp_path: Path, web: DemoWeb
) -> None:
    ground, requests = Ground.new(tmp_path, web, 0, shards=2, pairs_per_shard=3, delay_ms=1), Requests(web)
    run_here(ground.store)
    ground.assert_whole(requests)
    urlopen(ground.pairs[4][0]).close()
    with pytest.raises(AssertionError, match=r"generated/4\.jpg.* was fetched again"):
        ground.assert_whole(requests)


@pytest.mark.slow
@pytest.mark.cluster
def test_kills_of_worker_and_machine_lose_and_double_nothing(tmp_path: Path, web: DemoWeb) -> None:
    """`make chaos` does twenty of these rounds."""
    kill_rounds(tmp_path, web, ["worker", "machine", "worker"], shards=6, pairs_per_shard=40, delay_ms=80, seed=1)


@pytest.mark.cluster
def test_ingest_on_ray_commits_every_shard(
    store: LocalStore, tmp_path: Path, web: DemoWeb, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = generated(web.url, range(40))
    plan(store, tmp_path / "list.tsv", pairs, pairs_per_shard=10)
    monkeypatch.chdir(tmp_path)
    relative = open_store("pairs")  # workers have another working directory
    outcomes = list(ingest("pairs", pending(relative)))
    assert sorted((outcome.shard, outcome.state, outcome.kept) for outcome in outcomes) == [
        (shard, "committed", 10) for shard in range(4)
    ]
    assert_conserved(store, pairs)
    assert {read_attempt(store, name)["pid"] for name in list_attempts(store)}.isdisjoint({os.getpid()})
    assert len(read_instalments(store)) == 1
