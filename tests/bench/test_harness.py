from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.bench.harness import Measured, OwnProcess, alternate, cpu_s, device, measured, print_last_line, print_table


def test_sides_take_turns_and_each_round_is_kept() -> None:
    order: list[str] = []

    def side(name: str, cpu_s: float) -> Measured:
        order.append(name)
        return Measured(len(order), cpu_s, 0.0)

    seconds = iter([5.0, 1.0, 3.0])
    turns = alternate({"A": lambda: side("A", next(seconds)), "B": lambda: side("B", 2.0)}, rounds=3)
    assert order == ["A", "B"] * 3
    assert [turn.made for turn in turns["B"]] == [2, 4, 6]
    assert cpu_s(turns["A"]) == 3.0


def test_fewer_than_three_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        alternate({"A": lambda: Measured(None, 0.0, 0.0)}, rounds=2)


def test_the_cpu_of_a_child_that_ended_counts() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    turn = measured(subprocess.run, [sys.executable, "-c", burn])
    assert turn.made.returncode == 0
    assert turn.cpu_s >= 0.29


def test_a_side_of_its_own_has_a_process_an_environment_and_one_cpu_for_all_rounds() -> None:
    cpu = min(os.sched_getaffinity(0))
    with OwnProcess(cpu, {"ARMCHAIR_BENCH": "here"}, os.getpid) as side:
        first, second = side.run(os.getpid), side.run(os.getpid)
        assert first.made == second.made != os.getpid()
        assert side.run(os.sched_getaffinity, 0).made == {cpu}
        assert side.run(os.getenv, "ARMCHAIR_BENCH").made == "here"
        assert side.start_up_cpu_s > first.cpu_s  # the start of Python is in no round
        with pytest.raises(json.JSONDecodeError):
            side.run(json.loads, "{")


def test_the_last_line_is_one_json_object_after_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    where = device("numpy")
    print_table({"ours": [Measured(2, 0.5, 1.0)] * 3, "theirs": [Measured(2, 1.0, 1.0)] * 3}, 2, "picture")
    print_last_line("ingest", where, {"http": 2.00049}, kept=2)
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[1:]] == [["ours", "250.00"], ["theirs", "500.00"]]
    assert json.loads(last) == {"stage": "ingest", "device": where, "ratios": {"http": 2.0}, "kept": 2}
    assert "numpy 2" in where
    assert "cores" in where
