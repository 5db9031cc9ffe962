"""Attempt records: a sign of life while the work goes on, and the last word about how it ended."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

import ops.attempts
from infra.store import LocalStore
from ops.attempts import Attempt, count_deferrals, list_attempts, read_attempt, record_death


class Full(LocalStore):
    """A disk that takes no attempt record while `full`."""

    full = False
    refused = 0

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
        if self.full and key.startswith("attempts/"):
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device", key)
        return super().put(key, data, if_absent=if_absent)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_a_living_attempt_gives_signs_of_life_with_its_progress(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.attempts, "HEARTBEAT_S", 0.02)
    with Attempt(store, "pairs", 3, 0) as attempt:
        (name,) = list_attempts(store, 3, 0)
        assert read_attempt(store, name)["state"] == "running"
        attempt.rows_done = 5
        deadline_s = time.monotonic() + 10
        while read_attempt(store, name)["rows_done"] != 5:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        attempt.end("committed", rows=9)
        time.sleep(0.1)
        ended = read_attempt(store, name)
    assert (ended["state"], ended["rows"]) == ("committed", 9), "no heartbeat after the end overwrites it"
    assert len(list(list_attempts(store))) == 1


def test_an_attempt_left_by_an_error_says_which(store: LocalStore) -> None:
    with pytest.raises(OSError, match="disk"), Attempt(store, "pairs", 3, 0):
        raise OSError("disk full")
    (record,) = (read_attempt(store, name) for name in list_attempts(store))
    assert (record["state"], record["error"], record["text"]) == ("failed", "OSError", "disk full")
    assert "test_attempts.py" in record["traceback"]


def test_a_death_is_told_in_the_record_of_its_own_run_and_of_no_other(store: LocalStore) -> None:
    for run in ("ours", "theirs"):
        with Attempt(store, "pairs", 3, 0, run):
            pass  # left running: what a killed worker leaves
    record_death(store, "pairs", 3, 0, "ours", RuntimeError("worker killed"))
    record_death(store, "pairs", 4, 0, "ours", RuntimeError("died before its first record"))
    records = [read_attempt(store, name) for name in list_attempts(store)]
    assert sorted((record["shard"], record["run"], record["state"]) for record in records) == [
        (3, "ours", "died"),
        (3, "theirs", "running"),
        (4, "ours", "died"),
    ]


def test_deferrals_are_counted_for_one_generation_of_one_shard(store: LocalStore) -> None:
    for shard, generation, state in [(3, 0, "deferred"), (3, 0, "deferred"), (3, 0, "failed"), (3, 1, "deferred")]:
        with Attempt(store, "pairs", shard, generation) as attempt:
            attempt.end(state)  # type: ignore[arg-type]
    assert [count_deferrals(store, *at) for at in [(3, 0), (3, 1), (30, 0)]] == [2, 1, 0]


def test_an_end_that_can_not_be_recorded_is_told_and_changes_no_outcome(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Full(tmp_path)
    with Attempt(store, "pairs", 3, 0) as attempt:
        store.full = True
        attempt.end("committed")
    assert "attempts/00003.g0-" in caplog.text
    assert "not recorded as committed: [Errno 28] No space left on device" in caplog.text


def test_an_error_is_not_hidden_by_a_record_that_can_not_be_written(tmp_path: Path) -> None:
    store = Full(tmp_path)

    def work() -> None:
        store.full = True
        raise ZeroDivisionError("the cause")

    with pytest.raises(ZeroDivisionError, match="the cause"), Attempt(store, "pairs", 3, 0):
        work()


def test_a_deferral_that_can_not_be_counted_is_an_error(tmp_path: Path) -> None:
    store = Full(tmp_path)
    with Attempt(store, "pairs", 3, 0) as attempt:
        store.full = True
        with pytest.raises(OSError, match="No space left"):
            attempt.end("deferred")


def test_a_heart_beats_on_when_the_disk_has_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.attempts, "HEARTBEAT_S", 0.02)
    store = Full(tmp_path)
    with Attempt(store, "pairs", 3, 0) as attempt:
        (name,) = list_attempts(store)
        store.full = True
        deadline_s = time.monotonic() + 10
        while store.refused < 2:
            assert time.monotonic() < deadline_s, "the heart stopped"
            time.sleep(0.01)
        store.full = False
        attempt.rows_done = 5
        while read_attempt(store, name)["rows_done"] != 5:
            assert time.monotonic() < deadline_s, "the heart stopped"
            time.sleep(0.01)


def test_a_death_that_can_not_be_recorded_does_not_end_the_driver(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Full(tmp_path)
    with Attempt(store, "pairs", 3, 0, "ours"):
        pass
    store.full = True
    for shard in (3, 4):
        record_death(store, "pairs", shard, 0, "ours", RuntimeError("worker killed"))
    assert store.refused == 2
    assert caplog.text.count("not recorded as died") == 2
