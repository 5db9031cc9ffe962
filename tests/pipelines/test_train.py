"""The flows of learning: what Prefect shows while a run is under way, and the cluster that they give it to."""

from __future__ import annotations

import contextvars
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.cluster import REPO, Cluster, Place
from infra.store import open_store
from ops.run_record import read_run
from ops.train_job import _client
from ops.trained import latest_checkpoint
from pipelines.train import train_tokenizer, train_transformer
from tests.buckets import free_ports
from tests.ops.conftest import Learned
from tests.ray_head import Head, ray_head
from tests.small_runs import DVAE, TOKENIZER_TRAINING, TRANSFORMER, TRANSFORMER_TRAINING

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

PLACE = Place(threads=1)


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with pytest.MonkeyPatch.context() as patch, ray_head() as up:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield up


def flow_runs(location: Path) -> list[tuple[str, dict[str, Any]]]:
    """(state, {what: artifact}) of each run that made this place, the oldest first."""
    from prefect.client.orchestration import get_client

    found = []
    with get_client(sync_client=True) as client:
        for run in sorted(client.read_flow_runs(), key=lambda run: str(run.created)):
            if str(location) in json.dumps(run.parameters, default=str) and run.state is not None:
                asked = {"artifacts": {"flow_run_id": {"any_": [str(run.id)]}}}
                rows = client._client.post("/artifacts/filter", json=asked).json()
                names = [re.sub("^train-(tokenizer|transformer)-", "", row["key"]).split("-")[0] for row in rows]
                assert len(set(names)) == len(names), "what is told again takes the place of what was told before"
                found.append((run.state.name, dict(zip(names, rows, strict=True))))
    return found


def test_curves_and_sheets_are_shown_while_it_trains(
    learned: Learned, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.training.SILENCE_S", 2.0)
    seen: list[tuple[str, dict[str, Any]]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            seen.extend(flow_runs(tmp_path / "tokenizer"))

    context = contextvars.copy_context()
    watcher = threading.Thread(target=context.run, args=(watch,))
    watcher.start()
    try:
        training = replace(TOKENIZER_TRAINING, steps=600, checkpoint_every=100)
        train_tokenizer(str(learned.pairs), str(tmp_path / "tokenizer"), DVAE, training, place=PLACE)
    finally:
        ended.set()
        watcher.join()
    under_way = [artifacts for state, artifacts in seen if state == "Running" and "curves" in artifacts]
    steps = sorted({int(re.findall(r"step (\d+) of 600", row["curves"]["data"])[0]) for row in under_way})
    assert len(steps) >= 2, "the curves grew while the run was running"
    assert all("data:image/png;base64," in row["sheet"]["data"] for row in under_way if "sheet" in row)
    assert len({row["sheet"]["data"] for row in under_way if "sheet" in row}) >= 2
    ((state, artifacts),) = flow_runs(tmp_path / "tokenizer")
    assert state == "Completed"
    assert "step 600 of 600" in artifacts["curves"]["data"]
    assert "data:image/svg+xml;base64," in artifacts["curves"]["data"]
    assert re.search(r"\| Objective \| training \| -?[\d.]+ \|", artifacts["curves"]["data"]), artifacts["curves"][
        "data"
    ]


def test_a_flow_on_a_cluster_that_takes_jobs_follows_one(head: Head, learned: Learned, tmp_path: Path) -> None:
    into = tmp_path / "model"
    told = train_transformer(
        str(learned.tokens), str(into), TRANSFORMER, TRANSFORMER_TRAINING, cluster=Cluster(head.address), place=PLACE
    )
    here, there = latest_checkpoint(open_store(str(learned.model))), latest_checkpoint(open_store(str(into)))
    assert here is not None
    assert there is not None
    assert told["digest"] == here.digest == there.digest
    (job,) = [job for job in _client(head.server).list_jobs() if job.metadata.get("into") == str(into)]
    assert job.status.value == "SUCCEEDED"
    ((state, artifacts),) = flow_runs(into)
    assert state == "Completed"
    assert f"{head.server}/#/jobs" in artifacts["ray"]["data"]
    assert "step 20 of 20" in artifacts["curves"]["data"]


def _command(*arguments: str) -> subprocess.Popen[str]:
    from prefect.settings import PREFECT_API_URL

    environment = os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", "train", *arguments],
        cwd=REPO,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_command_that_is_stopped_stops_its_job(head: Head, learned: Learned, tmp_path: Path) -> None:
    into = tmp_path / "tokenizer"
    sets = ["--set", "tokenizer_training.steps=100000", "--set", "tokenizer_training.checkpoint_every=100000"]
    with _command("tokenizer", str(learned.pairs), "--into", str(into), "--address", head.server,
                  "--preset", "tiny", *sets) as command:  # fmt: skip
        give_up_s = time.monotonic() + 120
        while "step" not in (read_run(open_store(str(into))) or {}):
            assert command.poll() is None, command.communicate()
            assert time.monotonic() < give_up_s
            time.sleep(0.2)
        command.send_signal(signal.SIGTERM)
        _, said = command.communicate(timeout=60)
    assert command.returncode == 143, said
    assert "armchair: stopped. Run the same command again" in said
    assert "Traceback" not in said
    (job,) = [job for job in _client(head.server).list_jobs() if job.metadata.get("into") == str(into)]
    assert job.status.value == "STOPPED"
    assert (read_run(open_store(str(into))) or {})["state"] == "stopped"


def test_an_address_that_nobody_answers_at_ends_the_command_with_3(learned: Learned, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    into = str(tmp_path / "tokenizer")
    address = f"http://127.0.0.1:{port}"
    with _command("tokenizer", str(learned.pairs), "--into", into, "--preset", "tiny", "--address", address) as command:
        _, said = command.communicate(timeout=120)
    assert command.returncode == 3, said
    assert f"armchair: Nobody answers at {address}" in said
    assert "Traceback" not in said
