"""Forty rounds of SIGKILL over six shards of 100 pairs, through the command line with its Prefect and its Ray: on local
disk and in a bucket of SeaweedFS. Their short twin is in tests/ops/test_ingest.py."""

from __future__ import annotations

import random
import secrets
from collections import Counter
from pathlib import Path

import pytest

from ops.demo_web import serve
from tests.buckets import BUCKET, Bucket
from tests.kills import Driver, Ground, kill_rounds

VICTIMS = ["worker", "raylet", "driver", "machine", "server"]
SETTINGS = {
    "fetch.allow_private": '["127.0.0.0/8"]',
    "fetch.threads": 8,
    "fetch.deadline_s": 5,
    "fetch.connections_per_host": 8,
    "plan.pairs_per_shard": 100,
    "picture.short_side_px": 64,
}


def _command(ground: Ground, log: Path) -> Driver:
    sets = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    return Driver("pipelines", "ingest", ground.path, "--into", ground.store.location, "--cpus", "2", *sets, log=log)


def _rounds(tmp_path: Path, count: int, seed: int, within: str | None = None) -> None:
    victims = random.Random(seed).sample(VICTIMS * (count // len(VICTIMS)), count)
    with serve(tmp_path) as web:
        done = kill_rounds(
            tmp_path, web, victims, 6, 100, delay_ms=100, seed=seed, start=_command, within=within
        )  # fmt: skip
    print(f"{dict(Counter(victims))} killed, {done}")


@pytest.mark.timeout(5400)
def test_twenty_kills_on_local_disk_lose_and_double_nothing(tmp_path: Path) -> None:
    _rounds(tmp_path, 20, seed=4)


@pytest.mark.timeout(5400)
def test_twenty_kills_in_a_bucket_lose_and_double_nothing(
    tmp_path: Path, seaweedfs_server: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    seaweedfs_server.use(monkeypatch)
    _rounds(tmp_path, 20, seed=5, within=f"s3://{BUCKET}/{secrets.token_hex(4)}")
