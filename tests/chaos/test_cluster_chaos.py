"""A whole build on three nodes that share nothing but a bucket. In each of its stages a node loses its power."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from infra.cluster import REPO, Place
from infra.store import open_store
from ops.attempts import list_attempts, read_attempt
from ops.demo_web import serve
from ops.jobs import Job
from ops.run_record import read_run
from ops.trained import latest_checkpoint
from ops.verify import verify
from pipelines.settings import resolve
from pipelines.stages import Run
from tests.buckets import BUCKET, Bucket
from tests.pairs import assert_conserved, generated
from tests.three_nodes import Node, Nodes, three_nodes
from tests.training_rounds import train_undisturbed

SETS = (
    'fetch.allow_private=["127.0.0.0/8"]',
    "plan.pairs_per_shard=10",
    *(
        f"{kind}_training.{line}"
        for kind in ("tokenizer", "transformer")
        for line in ("steps=400", "checkpoint_every=40")
    ),
)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_node_that_is_lost_in_each_stage_leaves_no_trace(
    seaweedfs_server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    seaweedfs_server.use(monkeypatch)
    run = Run(f"s3://{BUCKET}/{secrets.token_hex(4)}")
    with serve(tmp_path) as web, three_nodes(environment=seaweedfs_server.environment) as cluster:
        pairs = generated(web.url, range(120), delay_ms=200)
        table = tmp_path / "list.tsv"
        table.write_text("".join(f"{url}\t{caption}\n" for url, caption in [("url", "caption"), *pairs]))
        command = [sys.executable, "-m", "pipelines", "build", str(table), "--into", run.location, "--preset", "tiny"]
        command += ["--workers", "2", "--threads", "1", *(["--sharded"] if sharded else [])]
        command += [word for line in SETS for word in ("--set", line)]
        environment = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        with (tmp_path / "said").open("w") as said:
            build = subprocess.Popen(command, cwd=REPO, env=environment, stderr=said)
        told: list[str] = []
        try:
            for stage, victim in (
                (run.pairs, _of_a_shard),
                (run.tokenizer, _of_a_rank),
                (run.tokens, _of_a_shard),
                (run.model, _of_a_rank),
            ):
                node = _wait_for(lambda of=victim, stage=stage: of(cluster, stage), build, tmp_path / "said")
                assert node is not None
                node.switch_off()
                told.append(f"{stage.rpartition('/')[2]}: {node.name} off")
                time.sleep(15)  # until Ray has noticed; then the machine is there again
                cluster.switch_on(node)
            assert build.wait(900) == 0, (tmp_path / "said").read_text()[-5000:]
        finally:
            if build.poll() is None:
                build.kill()
                build.wait()
        print("\n".join(told))
        assert_conserved(open_store(run.pairs), pairs)
    assert verify(open_store(run.pairs), deep=True).ok
    assert verify(open_store(run.tokens), deep=True).ok
    settings = resolve("tiny", SETS)
    for job in (run.tokenizer_job(settings), run.transformer_job(settings)):
        _assert_equal_to_undisturbed(job, tmp_path, Place(workers=2, threads=1, sharded=sharded))


def _of_a_shard(cluster: Nodes, stage: str) -> Node | None:
    """A node, not the head, on which a shard is open."""
    store = open_store(stage)
    running = {
        record["host"] for name in list_attempts(store) if (record := read_attempt(store, name))["state"] == "running"
    }
    return next((node for node in cluster.nodes[1:] if node.name in running), None)


def _of_a_rank(cluster: Nodes, stage: str) -> Node | None:
    """A node, not the head, on which a rank trains that has committed a checkpoint."""
    store = open_store(stage)
    latest, record = latest_checkpoint(store), read_run(store)
    if latest is None or record is None or latest.step <= 40:
        return None
    hosts = {rank.rpartition(":")[0] for rank in record.get("ranks", ())}
    return next((node for node in cluster.nodes[1:] if node.name in hosts), None)


def _assert_equal_to_undisturbed(job: Job, folder: Path, place: Place) -> None:
    store = open_store(job.into)
    latest, record = latest_checkpoint(store), read_run(store)
    assert latest is not None
    assert record is not None
    assert record["run"] > 1, "no training was disturbed"
    undisturbed = replace(job, into=str(folder / f"undisturbed-{job.kind}"))
    train_undisturbed(undisturbed, place, job.training.steps)
    there = latest_checkpoint(open_store(undisturbed.into))
    assert there is not None
    assert {name: ref.sha256 for name, ref in there.files.items()} == {
        name: ref.sha256 for name, ref in latest.files.items()
    }


def _wait_for(what: Callable[[], Node | None], build: subprocess.Popen[bytes], said: Path) -> Node | None:
    give_up_s = time.monotonic() + 400
    while (found := what()) is None:
        assert build.poll() is None, said.read_text()[-5000:]
        assert time.monotonic() < give_up_s, said.read_text()[-5000:]
        time.sleep(0.05)
    return found
