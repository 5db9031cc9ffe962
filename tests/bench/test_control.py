from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.store import LocalStore
from tests.bench.control import Sample, Sampler, busy_beside, dropped

ROOT = Path(__file__).parent.parent.parent


def write_attempt(store: LocalStore, shard: int, minute: int, seconds: float) -> None:
    record = {"started": f"2026-01-01T00:{minute:02d}:00+00:00", "seconds": seconds}
    store.put(f"attempts/{shard:05d}.g0-ab.json", json.dumps(record).encode())


def test_slots_beside_a_straggler_are_busy_as_long_as_others_are_open(tmp_path: Path) -> None:
    """Open from minute 0 to 10; of the others one covers minutes 1 to 3, one 2 to 6, and the last begins at 8."""
    store = LocalStore(tmp_path)
    for shard, (minute, minutes) in enumerate([(0, 10), (1, 2), (2, 4), (8, 1)]):
        write_attempt(store, shard, minute, 60.0 * minutes)
    told = busy_beside(store)
    assert told == {"open_s": 600.0, "watched_s": 480.0, "others_busy": 6 / 8}, "after minute 8 no work was waiting"


def test_a_lost_message_is_found_in_what_prefect_logs() -> None:
    lines = [
        "Subscription queue is full, dropping message for topic='events' queue_size=10000 retry_queue_size=0",
        "Event queue full (10/10), dropping event id=3",
        "Error flushing 50 events (0 to retry, 50 dropped)",
        "12:00:00 | WARNING | prefect - all is well",
    ]
    assert dropped("\n".join(lines)) == lines[:3]


def test_costs_of_a_shard_and_growth_are_taken_from_the_middle_of_a_run() -> None:
    sampler = Sampler({})
    sampler.samples = [
        Sample(0.0, 0, {"driver": 5.0}, {"driver": 50_000_000}),  # imports
        Sample(10.0, 100, {"driver": 6.0}, {"driver": 100_000_000}),
        Sample(20.0, 900, {"driver": 6.8, "workers": 8.0}, {"driver": 108_000_000}),
        Sample(90.0, 1000, {"driver": 90.0}, {"driver": 900_000_000}),  # the end
    ]
    assert sampler.of_a_shard(1000) == {
        "shards": 800,
        "wall_ms": pytest.approx(12.5),
        "cpu_ms": {"driver": pytest.approx(1.0), "workers": pytest.approx(10.0)},
    }
    assert sampler.memory(1000)["driver"]["mb_per_10000_shards"] == pytest.approx(100.0)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_benchmark_counts_every_shard_row_and_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.control", "--shards", "60", "--straggler-s", "3"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    last = json.loads(run.stdout.splitlines()[-1])
    assert last["stage"] == "control"
    assert last["nothing"]["done"] == last["whole"]["done"] == last["status"]["shards"]["committed"] == 60
    assert (last["lost_messages"], last["open_runs"]) == ([], [])
    assert last["whole"]["task_runs"] == 2, "the plan and one wave"
    assert last["whole"]["prefect_rows"] < 40
    assert last["straggler"]["open_s"] > 3
    assert last["straggler"]["others_busy"] > 1, "more than one of three slots, on a busy machine"
