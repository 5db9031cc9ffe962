"""Every night: docs/nightly.md is followed on a real Prefect server with a real worker, and then things are killed.

One server and one worker for the file, on the session's Ray. The commands that set them up are the lines of the page.
"""

from __future__ import annotations

import http.client
import importlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from infra.store import LocalStore, open_store
from ops.demo_web import DemoWeb, serve
from ops.run_record import read_run
from ops.shards import committed_generations
from ops.trained import latest_checkpoint
from tests.ops.conftest import Learned
from tests.pairs import assert_conserved, generated, rows
from tests.ray_head import Head, ray_head
from tests.small_runs import TRANSFORMER, TRANSFORMER_TRAINING

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

REPO = Path(__file__).parent.parent
PAGE = (REPO / "docs/nightly.md").read_text()
YAML = yaml.safe_load((REPO / "infra/prefect.yaml").read_text())
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line]
SETTINGS: dict[str, Any] = {
    "plan": {"pairs_per_shard": 8},
    "fetch": {"allow_private": ["127.0.0.0/8"], "threads": 2, "deadline_s": 5, "retries": 1, "backoff_s": 0.01},
    "picture": {"short_side_px": 64},
    "cluster": {},
}
PATIENCE_S = 240.0


def line_of_page(start: str) -> list[str]:
    """The one command of docs/nightly.md that starts so."""
    (line,) = {line.partition("  #")[0].strip() for line in COMMANDS if line.startswith(start)}
    return shlex.split(line)


def flow_of(entrypoint: str) -> str:
    """The name of the flow at path/to/file.py:function."""
    path, _, function = entrypoint.partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function)
    return str(flow.name)


def wait_for(what: str, is_so: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    began_s = time.monotonic()
    while not (found := is_so()):
        assert time.monotonic() - began_s < patience_s, f"{what}: not within {patience_s:.0f} s"
        time.sleep(0.2)
    return found


@dataclass
class Prefect:
    """A real server, which can be killed and started again, and what is asked of it."""

    folder: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, command: list[str]) -> int:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=REPO, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return self.processes[name].pid

    def start_server(self) -> None:
        port = self.environment["PREFECT_API_URL"].rpartition(":")[2].partition("/")[0]
        self.start("server", [*line_of_page("prefect server start"), "--host", "127.0.0.1", "--port", port])

        def is_well() -> bool:
            try:
                return bool(urlopen(f"{self.environment['PREFECT_API_URL']}/health", timeout=2).status == 200)
            except OSError:
                return False

        wait_for("the server answers", is_well)

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=REPO, env=self.environment | environment, capture_output=True, text=True, timeout=PATIENCE_S
        )

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """One request to the API as JSON."""
        status, text = self.answer(path, body, method)
        assert status < 300, f"{path}: {status} {text[:500]!r}"
        return json.loads(text or "null")

    def answer(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, bytes]:
        host, _, rest = self.environment["PREFECT_API_URL"].removeprefix("http://").partition("/")
        connection = http.client.HTTPConnection(host, timeout=60)
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        connection.request(method or ("GET" if body is None else "POST"), f"/{rest}{path}", data, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, text

    def deployment(self, name: str, flow: str = "ingest") -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"/deployments/name/{flow}/{name}")
        return found

    def runs(self) -> list[dict[str, Any]]:
        """Flow runs that began or were asked for, the oldest first."""
        found = self.ask("/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 200})
        return [run for run in reversed(found) if run["state_type"] != "SCHEDULED"]

    def state(self, run: str) -> str:
        return str(self.ask(f"/flow_runs/{run}")["state"]["name"])

    def begin(self, **parameters: Any) -> str:
        """Asks for a run of ingest/nightly and returns its id."""
        path = f"/deployments/{self.deployment('nightly')['id']}/create_flow_run"
        return str(self.ask(path, {"parameters": parameters})["id"])


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[Prefect]:
    import ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("nightly")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    server = Prefect(
        folder,
        clean
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        },
    )
    try:
        server.start_server()
        for start in ("prefect work-pool create", "prefect deploy "):
            told = server.run(*line_of_page(start))
            assert told.returncode == 0, told.stdout + told.stderr
        server.start("worker", line_of_page("prefect worker start"))
        yield server
    finally:
        for name in list(server.processes):
            server.kill(name)


@dataclass
class Night:
    """A watched folder, what it became, and the web that its lists name."""

    lists: Path
    store: LocalStore
    web: DemoWeb
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, seeds: range, delay_ms: int = 0) -> list[tuple[str, str]]:
        """A new list in the folder."""
        pairs = generated(self.web.url, seeds, delay_ms)
        lines = [("url", "caption"), *pairs]
        (self.lists / name).write_text("".join(f"{url}\t{caption}\n" for url, caption in lines))
        self.pairs += pairs
        return pairs

    def parameters(self) -> dict[str, Any]:
        return {"lists": [str(self.lists)], "into": str(self.store.root), **SETTINGS}

    def asked(self, pairs: list[tuple[str, str]]) -> dict[str, int]:
        counts = self.web.counts()
        paths = {url.removeprefix(self.web.url).partition("?")[0] for url, _ in pairs}
        return {path: counts[path] for path in sorted(paths) if path in counts}


@pytest.fixture(scope="module")
def night(prefect: Prefect) -> Iterator[Night]:
    lists = prefect.folder / "lists"
    lists.mkdir()
    with serve(prefect.folder) as web:
        yield Night(lists, LocalStore(prefect.folder / "pairs"), web)


def test_the_page_deploys_what_the_file_says_and_schedules_create_runs(prefect: Prefect) -> None:
    for declared in YAML["deployments"]:
        found = prefect.deployment(declared["name"], flow_of(declared["entrypoint"]))
        assert found["entrypoint"] == declared["entrypoint"]
        assert found["parameters"] == declared["parameters"]
        assert found["global_concurrency_limit"]["limit"] == 1
        assert found["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
        declares = [schedule.get("active", True) for schedule in declared.get("schedules", [])]
        assert [schedule["active"] for schedule in found["schedules"]] == declares
        assert found["pull_steps"] == [{"prefect.deployments.steps.set_working_directory": {"directory": str(REPO)}}]
    nightly = prefect.deployment("nightly")
    fields = nightly["parameter_openapi_schema"]["definitions"]["FetchSettings"]["properties"]
    assert fields["deadline_s"]["description"], "the docstring of a setting is its help in the form"
    training = prefect.deployment("default", "train-transformer")
    for settings in ("TransformerSettings", "TransformerTrainSettings", "Place", "Cluster"):
        fields = training["parameter_openapi_schema"]["definitions"][settings]["properties"]
        assert all(field.get("description") for field in fields.values()), "inherited settings, too"
    settings = prefect.deployment("default", "build")["parameter_openapi_schema"]["properties"]["settings"]
    assert [kind.get("type", "an object") for kind in settings["anyOf"]] == ["an object", "string"]
    of_nightly = {"deployments": {"id": {"any_": [nightly["id"]]}}}
    assert wait_for("the cron has runs to come", lambda: prefect.ask("/flow_runs/filter", of_nightly), 30)


@pytest.mark.parametrize(
    "bad",
    [
        {"fetch": {"deadline_s": -1}},
        {"fetch": {"dedline_s": 5}},
        {"lists": "no list of lists"},
        {"cluster": {"cpu": 2}},
        {"plan": {"held_out": "a lot"}},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_bad_parameters_are_refused_before_a_run_exists(prefect: Prefect, bad: dict[str, Any]) -> None:
    path = f"/deployments/{prefect.deployment('nightly')['id']}/create_flow_run"
    status, why = prefect.answer(path, {"parameters": bad})
    assert status in (409, 422)
    assert b"Validation failed" in why
    assert prefect.runs() == []


def test_bad_parameters_of_the_command_line_are_refused_in_words(prefect: Prefect) -> None:
    for bad, why in (('fetch={"deadline_s": -1}', "fetch.deadline_s"), ("intoo=x", "intoo")):
        told = prefect.run(*line_of_page("prefect deployment run ingest/nightly --watch"), "--param", bad)
        assert told.returncode != 0
        assert why in told.stdout + told.stderr
    assert prefect.runs() == []


def test_a_schedule_fires_ends_like_the_command_and_is_alone(prefect: Prefect, night: Night) -> None:
    first = night.add("a.tsv", range(24), delay_ms=800)
    nightly = prefect.deployment("nightly")
    rule = {"schedule": {"interval": 30}, "active": True, "parameters": night.parameters()}
    (schedule,) = prefect.ask(f"/deployments/{nightly['id']}/schedules", [rule])
    wait_for("the scheduled run asks the web", lambda: night.asked(first))
    prefect.ask(f"/deployments/{nightly['id']}/schedules/{schedule['id']}", method="DELETE")
    (run,) = [run for run in prefect.runs() if run["state_name"] == "Running"]
    assert run["auto_scheduled"]

    second = prefect.run(*line_of_page("prefect deployment run ingest/nightly --watch"))
    assert "Cancelled" in second.stdout + second.stderr
    refused = prefect.runs()[-1]
    assert (refused["auto_scheduled"], refused["state_name"]) == (False, "Cancelled")

    wait_for("the run ends", lambda: prefect.state(run["id"]) != "Running")
    assert prefect.state(run["id"]) == "Completed"
    assert_conserved(night.store, night.pairs)
    artifacts = prefect.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    assert {row["type"] for row in artifacts} == {"progress", "markdown"}
    assert any("24 judged, 24 kept" in str(row["data"]) for row in artifacts)
    of_run = {"logs": {"flow_run_id": {"any_": [run["id"]]}}}
    wait_for(
        "what a terminal would show stands in the run's log",
        lambda: any("3/3 shards" in row["message"] for row in prefect.ask("/logs/filter", of_run)),
    )


def test_growth_is_collected_and_a_server_that_is_killed_meanwhile_costs_nothing(
    prefect: Prefect, night: Night
) -> None:
    old = night.asked(night.pairs)
    with (night.lists / "a.tsv").open("a") as changed:
        changed.write("http://127.0.0.1:9/x.jpg\ta line too late\n")
    new = night.add("0-sorts-earlier.tsv", range(100, 116), delay_ms=1000)
    run = prefect.begin(**night.parameters())
    wait_for("the run asks the web", lambda: night.asked(new))
    prefect.kill("server")
    time.sleep(2)
    prefect.start_server()
    wait_for("the run ends", lambda: prefect.state(run) not in ("Running", "Pending", "Scheduled"))
    ended = prefect.ask(f"/flow_runs/{run}")
    assert ended["state"]["name"] == "CompletedWithFailures"
    assert "a.tsv" in ended["state"]["message"]
    assert_conserved(night.store, night.pairs)
    assert set(night.asked(new).values()) == {1}
    assert night.asked(night.pairs[:24]) == old


def test_after_a_machine_died_the_run_is_crashed_and_only_what_is_missing_is_done(
    prefect: Prefect, night: Night
) -> None:
    new = night.add("c.tsv", range(200, 248), delay_ms=1000)
    before = len(committed_generations(night.store))
    dead = prefect.begin(**night.parameters())
    wait_for("a shard is committed", lambda: len(committed_generations(night.store)) > before)
    driver = prefect.ask(f"/flow_runs/{dead}")["labels"]["armchair.pid"]
    prefect.kill("worker")
    os.kill(driver, signal.SIGKILL)
    prefect.start("worker", line_of_page("prefect worker start"))
    time.sleep(3)  # what the dead driver's tasks still commit
    assert prefect.state(dead) == "Running", "nobody could say that it is dead"
    done = [(row["url"], row["caption"]) for row in rows(night.store)]
    asked = night.asked(done)

    asked_at_start = sum(night.web.counts().values())
    command = ["armchair", "ingest", str(night.lists), "--into", str(night.store.root)]
    for section in ("plan", "fetch", "picture"):
        for name, value in SETTINGS[section].items():
            command += ["--set", f"{section}.{name}={json.dumps(value)}"]
    with subprocess.Popen(command, cwd=REPO, env=prefect.environment, stderr=subprocess.PIPE, text=True) as stopped:
        wait_for("the command asks the web", lambda: sum(night.web.counts().values()) > asked_at_start)
        wait_for("the dead run is found", lambda: prefect.state(dead) != "Running")
        stopped.send_signal(signal.SIGTERM)
        _, told = stopped.communicate(timeout=60)
    assert stopped.returncode == 143, told
    assert f"left by process {driver}" in told
    assert told.endswith("armchair: stopped. Run the same command again to go on from here.\n"), told
    assert prefect.state(dead) == "Crashed"
    assert prefect.runs()[-1]["state_name"] == "Crashed"

    parameters = [f"--param={name}={json.dumps(value)}" for name, value in night.parameters().items()]
    ended = prefect.run(*line_of_page("prefect deployment run ingest/nightly --watch"), *parameters)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "CompletedWithFailures" in ended.stdout  # a.tsv, still
    assert_conserved(night.store, night.pairs)
    assert night.asked(done) == asked
    assert set(night.asked(new)) == {url.removeprefix(night.web.url).partition("?")[0] for url, _ in new}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as up:
        yield up


def jobs_into(head: Head, into: Path) -> list[str]:
    """What became of the jobs that train in a place."""
    found = json.loads(urlopen(f"{head.server}/api/jobs/", timeout=30).read())
    return [job["status"] for job in found if (job["metadata"] or {}).get("into") == str(into)]


def training_into(head: Head, learned: Learned, into: Path, **training: Any) -> dict[str, Any]:
    return {
        "tokens": str(learned.tokens),
        "into": str(into),
        "transformer": asdict(TRANSFORMER),
        "training": asdict(TRANSFORMER_TRAINING) | training,
        "place": {"threads": 1},
        "cluster": {"address": head.server},
    }


def test_a_training_is_given_to_a_cluster_as_one_job_and_ends_as_on_a_laptop(
    prefect: Prefect, head: Head, learned: Learned, tmp_path: Path
) -> None:
    into = tmp_path / "model"
    parameters = training_into(head, learned, into)
    given = [f"--param={name}={json.dumps(value)}" for name, value in parameters.items()]
    ended = prefect.run("prefect", "deployment", "run", "train-transformer/default", "--watch", *given)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Completed" in ended.stdout
    assert jobs_into(head, into) == ["SUCCEEDED"]
    here, there = latest_checkpoint(open_store(str(learned.model))), latest_checkpoint(open_store(str(into)))
    assert here is not None
    assert there is not None
    assert there.digest == here.digest


def test_a_training_outlives_its_worker_and_a_run_that_is_cancelled_stops_it(
    prefect: Prefect, head: Head, learned: Learned, tmp_path: Path
) -> None:
    into = tmp_path / "model"
    store = open_store(str(into))
    parameters = training_into(head, learned, into, steps=1_000_000, checkpoint_every=1_000_000)
    path = f"/deployments/{prefect.deployment('default', 'train-transformer')['id']}/create_flow_run"
    first = prefect.ask(path, {"parameters": parameters})["id"]
    wait_for("it trains", lambda: "step" in (read_run(store) or {}))
    driver = prefect.ask(f"/flow_runs/{first}")["labels"]["armchair.pid"]
    prefect.kill("worker")
    os.kill(driver, signal.SIGKILL)
    step = (read_run(store) or {})["step"]
    prefect.ask(f"/flow_runs/{first}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    prefect.start("worker", line_of_page("prefect worker start"))

    second = prefect.ask(path, {"parameters": parameters})["id"]
    wait_for("the run follows the job", lambda: prefect.state(second) == "Running")
    wait_for("it trains on", lambda: (read_run(store) or {})["step"] > step)
    of_run = {"artifacts": {"flow_run_id": {"any_": [second]}}}
    wait_for(
        "its progress is shown",
        lambda: [row for row in prefect.ask("/artifacts/filter", of_run) if row["type"] == "progress"],
    )
    assert jobs_into(head, into) == ["RUNNING"]
    prefect.ask(f"/flow_runs/{second}/set_state", {"state": {"type": "CANCELLING"}})
    wait_for("the run is cancelled", lambda: prefect.state(second) == "Cancelled")
    wait_for("and so is the job", lambda: jobs_into(head, into) == ["STOPPED"], 60)
    record = read_run(store) or {}
    assert (record["run"], record["state"]) == (1, "stopped"), "it ended by itself, and was not killed"


@contextmanager
def between(prefect: Prefect, slow_every: int) -> Iterator[str]:
    """The address of Prefect's API behind a proxy that answers each `slow_every`-th request too late."""
    address = prefect.environment["PREFECT_API_URL"]
    host, _, _ = address.removeprefix("http://").partition("/")
    requests = 0

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            nonlocal requests
            requests += 1
            if requests % slow_every == 0:
                time.sleep(2.5)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            there = http.client.HTTPConnection(host, timeout=60)
            there.request(self.command, self.path, body, {**self.headers, "Host": host})
            answer = there.getresponse()
            data = answer.read()
            there.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = forward

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that has waited long enough hangs up."""

    server = Server(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/api"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_is_slow_now_and_then_and_then_gone_fails_nothing_that_is_committed(
    prefect: Prefect, night: Night, tmp_path: Path
) -> None:
    """Its answers are later than the client's patience every fifth time; at the end it is killed for good."""
    pairs = generated(night.web.url, range(300, 316), delay_ms=1000)
    listed = tmp_path / "list.tsv"
    listed.write_text("".join(f"{url}\t{caption}\n" for url, caption in [("url", "caption"), *pairs]))
    command = ["armchair", "ingest", str(listed), "--into", str(tmp_path / "pairs"), "--json"]
    command += ["--set", 'fetch.allow_private=["127.0.0.0/8"]', "--set", "fetch.threads=2"]
    command += ["--set", "plan.pairs_per_shard=8"]
    with between(prefect, slow_every=5) as address:
        patience = {"PREFECT_API_URL": address, "PREFECT_API_REQUEST_TIMEOUT": "1", "PREFECT_CLIENT_MAX_RETRIES": "3"}
        patience["PREFECT_CLIENT_RETRY_JITTER_FACTOR"] = "0"
        with subprocess.Popen(
            command,
            cwd=REPO,
            env=prefect.environment | patience,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as run:
            wait_for("the command asks the web", lambda: night.asked(pairs))
            prefect.kill("worker")
            prefect.kill("server")
            out, told = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, told
    assert json.loads(out)["pairs"]["kept"] == 16
    assert "does not answer" in told
    assert "The work is done." in told
    assert "Traceback" not in told
    assert_conserved(LocalStore(tmp_path / "pairs"), pairs)
