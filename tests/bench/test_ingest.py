from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bench.photographs import draw_photograph

ROOT = Path(__file__).parent.parent.parent


def test_a_photograph_of_a_number_is_always_the_same() -> None:
    first, again, other = (draw_photograph(number, 64, 48) for number in (1, 1, 2))
    assert first.shape == (48, 64, 3)
    assert (first == again).all()
    assert np.abs(first.astype(int) - other).mean() > 10


@pytest.mark.slow
def test_the_benchmark_compares_equal_work_and_ends_with_its_ratios() -> None:
    arguments = ["--pictures", "8", "--times", "1", "--rounds", "3", "--threads", "4", "--schemes", "http"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.bench.ingest", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    last = json.loads(run.stdout.splitlines()[-1])
    assert last["stage"] == "ingest"
    assert last["ratios"].keys() == {"http", "http_384"}
    assert min(last["ratios"].values()) > 0
    sides = ("http img2dataset", "http ours", "http ours, 384", "in memory")
    assert last["kept"] == dict.fromkeys(sides, 8)
    assert last["psnr_db"]["256"]["median"] >= 40
    assert last["psnr_db"]["384"]["median"] >= 40
