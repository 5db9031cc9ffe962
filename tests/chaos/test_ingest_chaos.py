"""Twenty rounds of SIGKILL over six shards of 200 pairs. Its short twin is in tests/ops/test_ingest.py."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ops.demo_web import serve
from tests.kills import kill_rounds


@pytest.mark.timeout(1800)
def test_twenty_kills_of_driver_or_worker_lose_and_double_nothing(tmp_path: Path) -> None:
    victims = random.Random(4).choices(["driver", "worker"], k=20)
    with serve(tmp_path) as web:
        used = kill_rounds(tmp_path, web, victims, shards=6, pairs_per_shard=200, delay_ms=10, seed=4)
    print(f"{len(victims)} kills ({victims.count('driver')} of the driver) over {used} directories of 6 x 200 pairs")
