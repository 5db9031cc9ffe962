"""Twenty rounds of SIGKILL over six shards of 200 pairs. Its short twin is in tests/ops/test_ingest.py."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from ops.demo_web import serve
from tests.kills import kill_rounds


@pytest.mark.timeout(1800)
def test_twenty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    victims = random.Random(4).choices(["driver", "machine", "worker"], k=20)
    with serve(tmp_path) as web:
        used = kill_rounds(tmp_path, web, victims, shards=6, pairs_per_shard=200, delay_ms=20, seed=4)
    print(f"{dict(Counter(victims))} killed, over {used} directories of 6 x 200 pairs")
