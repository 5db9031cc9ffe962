from __future__ import annotations

import subprocess
import sys

import pytest

from infra.metrics import Cost, timed


def test_cpu_time_of_a_grandchild_that_nobody_waits_for_counts() -> None:
    """As Ray's workers end: killed, and their parent is not told what they used."""
    busy = "import time\nwhile time.process_time() < 1.5: pass\ntime.sleep(1)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {busy!r}]); time.sleep(4)"
    costs: dict[str, Cost] = {}
    with timed("work", costs):
        subprocess.run([sys.executable, "-c", parent], check=True)
    assert 1.0 <= costs["work"]["cpu"] <= 4.0
    assert costs["work"]["wall"] >= 4.0


def test_what_a_block_cost_is_written_also_when_it_raises() -> None:
    costs: dict[str, Cost] = {}
    with pytest.raises(ValueError, match="broken"), timed("work", costs):
        raise ValueError("broken")
    assert costs["work"]["wall"] >= 0
