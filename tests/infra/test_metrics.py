from __future__ import annotations

import subprocess
import sys

import pytest

from infra.metrics import Cost, timed, tree_cpu_s


def test_cpu_time_of_children_counts_while_they_live_and_after() -> None:
    before = tree_cpu_s()
    busy = "import time\nwhile time.process_time() < 0.6: pass\nprint('done', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "done\n"
        assert tree_cpu_s() - before >= 0.5
        child.communicate("\n")
    assert tree_cpu_s() - before >= 0.5


def test_what_a_block_cost_is_written_also_when_it_raises() -> None:
    costs: dict[str, Cost] = {}
    with pytest.raises(ValueError, match="broken"), timed("work", costs):
        raise ValueError("broken")
    assert costs["work"]["wall"] >= 0
