"""Training as a job of a real Ray head with a job server: one job, whoever asks, and its end as if it had been here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest

from infra.cluster import ANSWER_S, REPO, ClusterError, Place, job_server
from infra.metrics import GAUGES
from infra.store import StoreError, open_store
from models.transformer import TransformerSettings
from ops.demo_web import serve
from ops.errors import ArmchairError, Diverged, RecipeChanged, UsageError
from ops.jobs import Job, TransformerTrainSettings
from ops.run_record import read_run, read_runs
from ops.train_job import _client, error_from, from_json, job_name, to_json, told_of, train_as_job
from ops.trained import latest_checkpoint
from tests.buckets import free_ports
from tests.ops.conftest import Learned
from tests.ops.test_errors import EXAMPLES
from tests.ray_head import Head, ray_head
from tests.small_runs import TOKENIZER_TRAINING, TRANSFORMER_TRAINING, tokenizer_job, transformer_job

PLACE = Place(threads=1)
LONG = 100_000


def on_a_cluster(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)):
        test = mark(test)
    return test


DRIVER = """
import sys
from ops.train_job import from_json, train_as_job
train_as_job(*from_json(sys.argv[1]), sys.argv[2], lambda line: print(line, flush=True))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with pytest.MonkeyPatch.context() as patch, ray_head() as up:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield up


CONNECTS = """
import sys
from infra.cluster import Cluster, ClusterError, connect
try:
    with connect(Cluster(sys.argv[1])):
        pass
except ClusterError as error:
    print(error)
"""


def _refusal(address: str) -> str:
    """What `connect` says of an address, in a process that is connected to no other Ray."""
    command = [sys.executable, "-c", CONNECTS, address]
    return subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout


def _jobs(head: Head, job: Job) -> dict[str, str]:
    """The names of this stage's jobs and what became of them."""
    stem = job_name(job, 0)[:-4]
    found = [each for each in _client(head.server).list_jobs() if (each.submission_id or "").startswith(stem)]
    return {str(each.submission_id): each.status.value for each in sorted(found, key=lambda each: each.submission_id)}


def _drive(job: Job, head: Head) -> subprocess.Popen[str]:
    """A process that asks for a training and follows it."""
    command = [sys.executable, "-c", DRIVER, to_json(job, PLACE), head.server]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _step(job: Job) -> int:
    record = read_run(open_store(job.into))
    return int(record.get("step", 0)) if record else 0


def _wait_for(is_so: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


@on_a_cluster
def test_two_who_ask_at_once_get_one_job_and_the_weights_of_a_laptop(
    head: Head, learned: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # Ray's own client would ask there, whatever it is given
    job, said = transformer_job(learned.tokens, tmp_path / "model"), []
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(train_as_job, job, PLACE, head.server, said.append) for _ in range(2)]
        trained = [each.result() for each in asked]
    assert trained[0] == trained[1]
    assert (trained[0].step, trained[0].was_done) == (20, False)
    there, here = (latest_checkpoint(open_store(str(into))) for into in (job.into, learned.model))
    assert there is not None
    assert here is not None
    assert there.files == here.files
    assert _jobs(head, job) == {job_name(job, 1): "SUCCEEDED"}
    assert any("20/20 steps" in line for line in said), said
    shown = json.loads(urlopen(f"{head.server}/api/train/v2/runs/v1", timeout=60).read())["train_runs"]
    assert [run["name"] for run in shown if str(job.into) in str(run)] == ["transformer-1"], "on the dashboard's page"
    assert train_as_job(job, PLACE, head.server).was_done
    assert len(_jobs(head, job)) == 1


@on_a_cluster
def test_prometheus_reads_how_a_training_goes(head: Head, learned: Learned, tmp_path: Path) -> None:
    training = replace(TRANSFORMER_TRAINING, steps=LONG, checkpoint_every=100, evaluate_pictures=0)
    job = transformer_job(learned.tokens, tmp_path / "model", training)
    driver = _drive(job, head)

    def gauges() -> dict[str, float]:
        try:
            with urlopen(head.metrics, timeout=30) as told:
                lines = [line for line in told.read().decode().splitlines() if f'into="{job.into}"' in line]
        except OSError:  # the head is up before its exporter is
            return {}
        return {line.partition("{")[0].removeprefix("ray_"): float(line.rpartition(" ")[2]) for line in lines}

    try:
        _wait_for(lambda: gauges().keys() >= {name for name, _ in GAUGES.values()})
        first = gauges()
        _wait_for(lambda: gauges()["armchair_train_step"] > first["armchair_train_step"])
        assert first["armchair_train_tokens_per_s"] > 0
        assert 0 <= first["armchair_train_data_wait_share"] < 1
        assert 0 <= first["armchair_train_checkpoint_age_s"] < 120
    finally:
        driver.send_signal(signal.SIGINT)
        driver.communicate()
    assert set(_jobs(head, job).values()) == {"STOPPED"}


@on_a_cluster
def test_a_killed_driver_leaves_the_job_the_next_one_follows_it_and_ctrl_c_stops_it(
    head: Head, learned: Learned, tmp_path: Path
) -> None:
    training = replace(TOKENIZER_TRAINING, steps=LONG, checkpoint_every=100)
    job = tokenizer_job(learned.pairs, tmp_path / "tokenizer", training)
    first, second = job_name(job, 1), job_name(job, 2)
    with _drive(job, head) as driver:
        _wait_for(lambda: _step(job) >= 100)
        driver.kill()
    with _drive(job, head) as driver:
        assert driver.stdout is not None
        assert f"follows {first}, which is under way" in driver.stdout.readline()
        driver.send_signal(signal.SIGINT)
        said, told = driver.communicate(timeout=60)
    assert "KeyboardInterrupt" in told
    assert f"stops the Ray job {first}" in said
    assert _jobs(head, job) == {first: "STOPPED"}
    (run,) = read_runs(open_store(job.into))
    assert run["state"] == "stopped", "it ended by itself, and was not killed"

    with ThreadPoolExecutor(1) as pool:  # now its process in the cluster is killed
        asked = pool.submit(train_as_job, job, PLACE, head.server)
        _wait_for(lambda: (read_run(open_store(job.into)) or {})["run"] == 2 and _step(job) > 100)
        record = read_run(open_store(job.into))
        assert record is not None
        assert record["from_step"] >= 100
        os.kill(record["pid"], signal.SIGKILL)
        with pytest.raises(ClusterError, match="run the same command again") as died:
            asked.result(timeout=60)
    assert f"The Ray job {second} ended as FAILED" in str(died.value)
    assert "trains" in str(died.value) or "steps" in str(died.value), "the last lines that it said"
    assert _jobs(head, job) == {first: "STOPPED", second: "FAILED"}


@on_a_cluster
def test_what_the_job_raises_is_raised_here(head: Head, learned: Learned, tmp_path: Path) -> None:
    job = tokenizer_job(learned.pairs, tmp_path / "tokenizer", replace(TOKENIZER_TRAINING, learning_rate=1e38))
    with pytest.raises(Diverged) as ended:
        train_as_job(job, PLACE, head.server)
    assert ended.value.args[0] == str(tmp_path / "tokenizer")
    with pytest.raises(RecipeChanged, match="learning_rate"):
        train_as_job(tokenizer_job(learned.pairs, tmp_path / "tokenizer"), PLACE, head.server)
    assert _jobs(head, job) == {job_name(job, 1): "FAILED"}


@on_a_cluster
def test_a_cluster_says_where_its_job_server_is(head: Head) -> None:
    assert job_server(head.address) == job_server(head.server) == head.server
    assert "takes trainings as jobs, and nothing else" in _refusal(head.server)
    with ray_head(cpus=1, names=head.server) as silent:
        assert job_server(silent.address) is None, "another cluster's job server is not taken for its own"


@on_a_cluster
def test_what_is_no_job_server_is_told(learned: Learned, tmp_path: Path) -> None:
    with serve(tmp_path) as web, pytest.raises(ClusterError, match="is no job server of Ray"):
        train_as_job(tokenizer_job(learned.pairs, tmp_path / "tokenizer"), PLACE, web.url)


def test_a_cluster_that_wants_a_token_says_how_to_give_it(learned: Learned, tmp_path: Path) -> None:
    class Closed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ClusterError, match="Set RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN"):
            train_as_job(tokenizer_job(learned.pairs, tmp_path / "tokenizer"), PLACE, address)
        server.shutdown()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_an_address_that_nobody_answers_at_is_told_soon(address: str) -> None:
    (port,) = free_ports(1)
    began_s = time.monotonic()
    with pytest.raises(ClusterError, match="Nobody answers"):
        job_server(address.format(port))
    assert time.monotonic() - began_s < ANSWER_S
    assert ("takes trainings as jobs" if address.startswith("http") else "Nobody answers") in _refusal(
        address.format(port)
    )


@pytest.mark.parametrize(("error", "exit_code", "parts"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_an_error_of_the_tree_comes_out_of_a_log_as_it_went_in(
    error: ArmchairError, exit_code: int, parts: list[str]
) -> None:
    again = error_from(json.loads(json.dumps(told_of(error))))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_what_a_disk_says_comes_out_of_a_log_as_a_word_of_the_storage() -> None:
    again = error_from(json.loads(json.dumps(told_of(OSError(28, "No space left on device")))))
    assert isinstance(again, StoreError)
    assert "No space left" in str(again)


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_a_job_is_one_line_and_comes_back_whole(kind: str, tmp_path: Path) -> None:
    if kind == "tokenizer":
        job = tokenizer_job(tmp_path / "it's", tmp_path / "into", replace(TOKENIZER_TRAINING, where={"a": ["b", "c"]}))
    else:
        training = replace(TRANSFORMER_TRAINING, prompts=("a red\n'square'",))
        job = transformer_job(tmp_path / "it's", tmp_path / "into", training)
    place = Place(workers=3, gpu=True)
    assert "\n" not in to_json(job, place)
    assert from_json(to_json(job, place)) == (job, place)
    plain = Job("transformer", "s3://a/tokens", "s3://a/model", TransformerSettings(), TransformerTrainSettings())
    assert from_json(to_json(plain, Place())) == (plain, Place())
    assert to_json(plain, Place()) == '{"kind": "transformer", "source": "s3://a/tokens", "into": "s3://a/model"}'


@pytest.mark.parametrize(
    "bad", ["", "{}", '{"kind": "x"}', '{"kind": "tokenizer", "source": "a", "into": "b", "training": {"stesp": 3}}']
)
def test_what_is_no_job_is_told(bad: str) -> None:
    with pytest.raises(UsageError, match="this is no training"):
        from_json(bad)
