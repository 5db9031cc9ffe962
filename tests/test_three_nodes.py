"""An ingest on three nodes that share nothing but a bucket, one of which loses its power."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest

from infra.cluster import REPO
from infra.store import Store, open_store
from ops.attempts import list_attempts, read_attempt
from ops.demo_web import serve
from ops.shards import committed_generations
from tests.buckets import BUCKET, Bucket
from tests.pairs import assert_conserved, generated
from tests.three_nodes import UNSHARE, Nodes, three_nodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [
    'fetch.allow_private=["127.0.0.0/8"]',
    "fetch.threads=4",
    "fetch.connections_per_host=4",
    "plan.pairs_per_shard=20",
    "picture.short_side_px=64",
]


@pytest.fixture(scope="module")
def unshared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the driver that is another one, and empty, on each node."""
    return tmp_path_factory.mktemp("unshared")


@pytest.fixture(scope="module")
def nodes(unshared: Path, seaweedfs_server: Bucket) -> Iterator[Nodes]:
    if subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("this user may mount nothing, not even in a namespace of its own")
    with three_nodes(unshared, environment=seaweedfs_server.environment) as cluster:
        yield cluster


def _ingest(nodes: Nodes, path: Path, into: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines", "ingest", str(path), "--into", into]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    environment = os.environ | {"RAY_ADDRESS": nodes.address, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True)


def _list(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{url}\t{caption}\n" for url, caption in [("url", "caption"), *pairs]))
    return path


def test_a_directory_that_not_every_node_sees_is_refused_before_anything_is_fetched(
    nodes: Nodes, unshared: Path, tmp_path: Path
) -> None:
    with serve(tmp_path) as web:
        path = _list(tmp_path / "list.tsv", generated(web.url, range(4)))
        process = _ingest(nodes, path, str(unshared / "pairs"))
        _, said = process.communicate(timeout=300)
        assert process.returncode == 3, said
        assert "127.0.0.2, 127.0.0.3" in said
        assert "is not the same directory on" in said
        assert "Use a bucket (s3://" in said
        assert "Traceback" not in said
        assert not web.counts()
    assert not list((unshared / "pairs").glob(".tmp-*"))


def test_a_node_that_loses_its_power_costs_its_open_shards_and_nothing_else(
    nodes: Nodes, seaweedfs_server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seaweedfs_server.use(monkeypatch)
    store = open_store(f"s3://{BUCKET}/{secrets.token_hex(4)}/pairs")
    with serve(tmp_path) as web:
        pairs = generated(web.url, range(16 * 20), delay_ms=400)  # 2 s a shard
        process = _ingest(nodes, _list(tmp_path / "list.tsv", pairs), store.location)
        lost = nodes.nodes[2]
        _wait_until(lambda: len(committed_generations(store)) >= 3, process)
        _wait_until(lambda: lost.name in _running(store), process)
        lost.switch_off()
        off_s = store.clock_s()
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert_conserved(store, pairs)
    shards = committed_generations(store)
    assert set(shards.values()) == {0}
    attempts = [read_attempt(store, name) for name in list_attempts(store)]
    ended = Counter(attempt["state"] for attempt in attempts)
    assert ended["committed"] == len(shards)
    assert 1 <= ended["died"] <= 2  # what stood open on one CPU, and perhaps what it was just given
    assert {attempt["host"] for attempt in attempts if attempt["state"] == "died"} <= {lost.name, socket.gethostname()}
    # The other nodes went on without a pause: no attempt of theirs began long after the one before it ended.
    spans = defaultdict(list)
    for attempt in attempts:
        if attempt["state"] == "committed":
            began_s = datetime.fromisoformat(attempt["started"]).timestamp()
            spans[attempt["host"]].append((began_s, began_s + attempt["seconds"]))
    for host in (node.name for node in nodes.nodes if node is not lost):
        mine = sorted(spans[host])
        assert mine[-1][1] > off_s, f"{host} did nothing after {lost.name} was gone"
        idle_s = [begun - over for (_, over), (begun, _) in pairwise(mine)]
        print(host, len(mine), "shards, idle between them at most", round(max(idle_s), 2), "s")
        assert max(idle_s) < 10, f"{host} was idle for {max(idle_s):.1f} s"


def _running(store: Store) -> set[str]:
    records = (read_attempt(store, name) for name in list_attempts(store))
    return {record["host"] for record in records if record["state"] == "running"}


def _wait_until(what: object, process: subprocess.Popen[str]) -> None:
    assert callable(what)
    give_up_s = time.monotonic() + 200
    while not what():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < give_up_s
        time.sleep(0.1)
