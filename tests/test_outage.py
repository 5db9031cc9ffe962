"""The web dies in the middle of an ingest and comes back, seen from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.cluster import REPO
from infra.store import LocalStore
from ops.demo_web import serve
from ops.plan import read_instalments, read_work_order
from ops.shards import committed_generations
from tests.pairs import assert_conserved, generated

SETTINGS = [
    'fetch.allow_private=["127.0.0.0/8"]',
    "fetch.threads=2",
    "fetch.backoff_s=0.01",
    "plan.pairs_per_shard=10",
    "picture.short_side_px=64",
]


@pytest.mark.cluster
@pytest.mark.slow
def test_shards_that_met_an_outage_wait_and_are_told_and_the_same_command_does_only_these(tmp_path: Path) -> None:
    into, path = tmp_path / "pairs", tmp_path / "list.tsv"
    store = LocalStore(into)
    command = [sys.executable, "-m", "pipelines", "ingest", str(path), "--into", str(into), "--cpus", "2"]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    with serve(tmp_path) as web:
        port = web.server.server_address[1]
        pairs = generated(web.url, range(80), delay_ms=300)  # 1.5 s a shard
        path.write_text("".join(f"{url}\t{caption}\n" for url, caption in [("url", "caption"), *pairs]))
        process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True)
        give_up_s = time.monotonic() + 200
        while len(committed_generations(store)) < 2 and process.poll() is None and time.monotonic() < give_up_s:
            time.sleep(0.02)
    _, said = process.communicate(timeout=200)  # the server is gone
    assert process.returncode == 5, said
    assert "Run the same command again: it does only what is missing." in said
    committed = committed_generations(store)
    assert 2 <= len(committed) < 8

    status = [sys.executable, "-m", "pipelines", "status", str(into), "--json"]
    told = json.loads(subprocess.run(status, cwd=REPO, capture_output=True, check=True).stdout)
    assert told["shards"]["deferred"] == 8 - len(committed)
    for left in told["unfinished"]:
        assert (left["state"], left["attempts"]) == ("deferred", 1)
        assert "rows failed for reasons that may pass: connect" in left["why"]

    with serve(tmp_path, port) as web:
        again = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
        assert again.returncode == 0, again.stderr
        asked = set(web.counts())
    assert_conserved(store, pairs)
    for order in (order for part in read_instalments(store) for order in part.work_orders):
        paths = {
            url.removeprefix(web.url).partition("?")[0] for url in read_work_order(store, order)["url"].to_pylist()
        }
        assert paths.isdisjoint(asked) if order.shard in committed else paths <= asked
