from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_all_sides_give_every_picture_once_and_the_last_line_has_the_ratios() -> None:
    arguments = ["--shards", "2", "--drawn", "2", "--workers", "2", "--step-ms", "1", "--codes", "4096"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.bench.read", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr  # 1 where a side gave another number of pictures
    last = json.loads(run.stdout.splitlines()[-1])
    assert last["stage"] == "read"
    assert {"ray_data"} <= last["ratios"].keys() <= {"ray_data", "webdataset"}
    assert last["sides"].keys() >= {"ours", "ours, children", "ray_data"}
    assert all(side["2"]["pictures_per_s"] > 0 for side in last["sides"].values())
    assert all(0 <= side["2"]["waited_share"] <= 1 for side in last["sides"].values())
    assert last["codes_rows_per_s"] > 0
