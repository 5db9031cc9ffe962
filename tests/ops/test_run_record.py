from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.store import LocalStore, open_store
from ops.errors import RunAlive
from ops.run_record import ALIVE_S, RUN, Heartbeat, ask_to_stop, claim_run, end_run, read_run


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "model")


def _rewrite(store: LocalStore, age_s: float = 0.0, **changed: Any) -> None:
    record = json.loads(store.read(RUN)) | changed
    store.put(RUN, json.dumps(record).encode(), if_absent=False)
    then = store.clock_s() - age_s
    os.utime(store.root / RUN, (then, then))


def test_a_living_run_blocks_another_and_not_itself(store: LocalStore) -> None:
    claim_run(store, "one")
    claim_run(store, "one")
    with pytest.raises(RunAlive, match=f"process {os.getpid()} on"):
        claim_run(store, "two")


def test_a_process_of_this_machine_that_is_gone_does_not_block(store: LocalStore) -> None:
    claim_run(store, "one")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _rewrite(store, pid=gone.pid)
    claim_run(store, "two")


def test_a_run_on_another_machine_blocks_until_it_has_been_silent_for_a_minute(store: LocalStore) -> None:
    claim_run(store, "one")
    _rewrite(store, host="elsewhere", age_s=ALIVE_S - 5)
    with pytest.raises(RunAlive, match="elsewhere"):
        claim_run(store, "two")
    _rewrite(store, host="elsewhere", age_s=ALIVE_S + 5)
    claim_run(store, "two")


def test_a_run_that_ended_does_not_block(store: LocalStore) -> None:
    claim_run(store, "one")
    end_run(store, "one", "done")
    claim_run(store, "two")
    end_run(store, "one", "failed")  # too late to say anything
    record = read_run(store)
    assert record is not None
    assert (record["run"], record["state"]) == ("two", "running")


def test_the_heartbeat_tells_the_progress_and_ends_with_its_block(store: LocalStore) -> None:
    claim_run(store, "one")
    with Heartbeat(store, "one") as heart:
        heart.facts = {"step": 7, "steps": 10, "loss": 1.5}
        heart._look_and_put()
        assert not heart.must_stop
    assert not heart._thread.is_alive()
    end_run(store, "one", "stopped")
    record = read_run(store)
    assert record is not None
    assert (record["state"], record["step"], record["pid"]) == ("stopped", 7, os.getpid())


def test_the_heartbeat_gives_way_to_a_run_that_took_over(store: LocalStore) -> None:
    claim_run(store, "one")
    with Heartbeat(store, "one") as heart:
        _rewrite(store, run="two")
        heart._look_and_put()
        assert heart.must_stop
        with pytest.raises(RunAlive):
            heart.raise_if_taken()
    assert read_run(store)["run"] == "two"  # type: ignore[index]


def test_a_run_hears_that_it_should_stop_and_the_next_one_does_not(store: LocalStore) -> None:
    claim_run(store, "one")
    ask_to_stop(store, "one")
    with Heartbeat(store, "one") as heart:
        assert heart.must_stop
        heart.raise_if_taken()
    end_run(store, "one", "stopped")
    claim_run(store, "two")
    with Heartbeat(store, "two") as heart:
        assert not heart.must_stop


def test_a_run_whose_driver_has_ended_stops(store: LocalStore) -> None:
    claim_run(store, "one")
    end_run(store, "one", "stopped")
    with Heartbeat(store, "one") as heart:
        assert heart.must_stop
    assert read_run(store)["state"] == "stopped"  # type: ignore[index]


def test_there_is_no_record_where_nobody_trained(tmp_path: Path) -> None:
    assert read_run(open_store(str(tmp_path))) is None
