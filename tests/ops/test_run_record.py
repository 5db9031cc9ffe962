from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from infra.store import LocalStore, open_store
from ops.errors import RunAlive
from ops.run_record import ALIVE_S, Heartbeat, ask_to_stop, check_owner, claim_run, end_run, read_run, read_runs


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "model")


def _rewrite(store: LocalStore, age_s: float = 0.0, **changed: Any) -> None:
    key = "runs/0001/driver.json"
    record = json.loads(store.read(key)) | changed
    store.put(key, json.dumps(record).encode(), if_absent=False)
    then = store.clock_s() - age_s
    os.utime(store.root / key, (then, then))


def test_a_living_run_blocks_another_and_names_itself(store: LocalStore) -> None:
    claim_run(store)
    with pytest.raises(RunAlive, match=f"process {os.getpid()} on"):
        claim_run(store)


def test_of_many_that_start_in_the_same_moment_one_wins(store: LocalStore) -> None:
    won, lost, together = [], [], threading.Barrier(16)

    def start() -> None:
        together.wait()
        try:
            won.append(claim_run(store))
        except RunAlive as error:
            lost.append(error)

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (won, len(lost)) == ([1], 15)


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_process_of_this_machine_that_is_gone_does_not_block(store: LocalStore, is_reaped: bool) -> None:
    claim_run(store)
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    _rewrite(store, pid=gone.pid, started=_started(gone.pid))
    with pytest.raises(RunAlive):
        claim_run(store)
    gone.kill()
    if is_reaped:
        gone.wait()
    else:
        os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has taken its corpse away
    assert claim_run(store) == 2
    gone.wait()
    assert gone.stdin is not None
    gone.stdin.close()


def test_another_process_that_got_the_number_of_a_dead_one_does_not_block(store: LocalStore) -> None:
    claim_run(store)
    _rewrite(store, started="1")
    assert claim_run(store) == 2


def _started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_a_run_on_another_machine_blocks_until_it_has_been_silent_for_a_minute(store: LocalStore) -> None:
    claim_run(store)
    _rewrite(store, host="elsewhere", age_s=ALIVE_S - 5)
    with pytest.raises(RunAlive, match="elsewhere"):
        claim_run(store)
    _rewrite(store, host="elsewhere", age_s=ALIVE_S + 5)
    claim_run(store)


def test_its_rank_0_is_a_sign_of_life_too(store: LocalStore) -> None:
    run = claim_run(store)
    with Heartbeat(store, run, "worker"):
        _rewrite(store, host="elsewhere", age_s=ALIVE_S + 5)
        with pytest.raises(RunAlive, match="elsewhere"):
            claim_run(store)


def test_a_run_that_ended_does_not_block_and_can_say_nothing_for_its_successor(store: LocalStore) -> None:
    first = claim_run(store)
    end_run(store, first, "done")
    second = claim_run(store)
    end_run(store, first, "failed")
    record = read_run(store)
    assert record is not None
    assert (record["run"], record["state"]) == (second, "running")
    assert [record["state"] for record in read_runs(store)] == ["failed", "running"]


def test_the_heartbeat_tells_the_progress_and_ends_with_its_block(store: LocalStore) -> None:
    run = claim_run(store)
    with Heartbeat(store, run, "worker") as heart:
        heart.facts = {"step": 7, "steps": 10, "loss": 1.5}
        heart._look_and_put()
        assert not heart.must_stop
    assert not heart._thread.is_alive()
    end_run(store, run, "stopped")
    record = read_run(store)
    assert record is not None
    assert (record["state"], record["step"], record["worker"]["pid"]) == ("stopped", 7, os.getpid())


def test_a_run_that_wakes_up_after_another_took_over_stops_and_leaves_the_record_alone(store: LocalStore) -> None:
    first = claim_run(store)
    _rewrite(store, started="1")
    with Heartbeat(store, first, "worker") as heart:
        second = claim_run(store)
        end_run(store, second, "done")  # also when that one has ended already
        heart._look_and_put()
        assert heart.must_stop
        with pytest.raises(RunAlive):
            check_owner(store, first)
    check_owner(store, second)
    assert read_run(store)["run"] == second  # type: ignore[index]


def test_a_run_hears_that_it_should_stop_and_the_next_one_does_not(store: LocalStore) -> None:
    first = claim_run(store)
    ask_to_stop(store, first)
    with Heartbeat(store, first, "worker") as heart:
        assert heart.must_stop
        check_owner(store, first)
    end_run(store, first, "stopped")
    with Heartbeat(store, claim_run(store), "worker") as heart:
        assert not heart.must_stop


def test_a_run_whose_driver_has_ended_stops(store: LocalStore) -> None:
    run = claim_run(store)
    end_run(store, run, "stopped")
    with Heartbeat(store, run, "worker") as heart:
        assert heart.must_stop
    assert read_run(store)["state"] == "stopped"  # type: ignore[index]


def test_there_is_no_record_where_nobody_trained(tmp_path: Path) -> None:
    assert read_run(open_store(str(tmp_path))) is None
