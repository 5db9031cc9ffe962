"""The live table: what it shows, and that Ctrl-C is its good end."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infra.store import LocalStore
from ops.attempts import Attempt
from ops.status import status
from pipelines.show import show_status
from pipelines.watch import _without_ages, render
from tests.pairs import generated, plan

REPO = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A plan of three shards, of which nothing is done."""
    found = LocalStore(tmp_path / "pairs")
    plan(found, tmp_path / "list.tsv", generated("http://127.0.0.1:9", range(9)), pairs_per_shard=3)
    return found


def drawn(told: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=110, force_terminal=False).print(render(told))
    return out.getvalue()


def test_the_table_tells_what_the_plain_lines_tell(store: LocalStore) -> None:
    with Attempt(store, "pairs", 1, 0, "a run") as attempt:
        attempt.rows_done = 2
        attempt.end("deferred", transient=2, asked=3, rows=3, rejected={"timeout": 2})
    told = status(store)
    told["pairs"] |= {"kept": 3, "rejected": {"http_4xx": 2, "timeout": 4}}
    for text in (drawn(told), show_status(told)):
        assert "1 deferred, 2 untried" in text
        assert text.index("timeout") < text.index("http_4xx"), "the largest first"
        assert "transient" in text
        assert "permanent" in text
        assert "2 of 3 rows failed for reasons that may pass: timeout 2" in text
        assert "run the same ingest again" in text


def test_shards_alive_are_shown_with_their_rows_and_nothing_is_asked_of_the_reader(store: LocalStore) -> None:
    with Attempt(store, "pairs", 1, 0, "a run") as attempt:
        attempt.rows_done = 2
        attempt._write()
        told = status(store)
    for text in (drawn(told), show_status(told)):
        assert "2 of 3 rows" in text
        assert f"(pid {os.getpid()})" in text
        assert "again" not in text


def test_seconds_that_pass_by_themselves_are_no_change(store: LocalStore) -> None:
    with Attempt(store, "pairs", 1, 0, "a run"):
        before = status(store)
        time.sleep(0.2)
        after = status(store)
    assert before != after
    assert _without_ages(before) == _without_ages(after)
    assert _without_ages(status(store) | {"bytes": 7}) != _without_ages(after)


def _until(stream: int, wanted: str) -> None:
    told, began_s = "", time.monotonic()
    while wanted not in told:
        assert time.monotonic() - began_s < 60, told
        if select.select([stream], [], [], 1.0)[0]:
            told += os.read(stream, 65536).decode(errors="replace")


def test_without_a_terminal_each_change_is_a_block_and_ctrl_c_ends_well(store: LocalStore) -> None:
    command = [sys.executable, "-m", "pipelines", "status", str(store.root), "--watch", "--json"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        assert json.loads(watch.stdout.readline())["shards"]["untried"] == 3
        with Attempt(store, "pairs", 2, 0, "a run"):
            assert json.loads(watch.stdout.readline())["shards"]["running"] == 1
        watch.send_signal(signal.SIGINT)
        assert watch.wait(30) == 0


def test_on_a_terminal_the_table_is_drawn_and_a_plain_one_stays_after_ctrl_c(store: LocalStore) -> None:
    command = [sys.executable, "-m", "pipelines", "status", str(store.root), "--watch"]
    ours, its = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(command, cwd=REPO, stdout=its, stdin=its, stderr=its, env=environment) as watch:
        _until(ours, "0 of 3")
        watch.send_signal(signal.SIGINT)
        _until(ours, "3 planned: 3 untried")
        assert watch.wait(30) == 0
    os.close(ours)
    os.close(its)


def test_a_reader_that_has_seen_enough_is_no_error(store: LocalStore) -> None:
    """`armchair status DIR | head -1`."""
    command = f"{{ {sys.executable} -m pipelines status {store.root}; echo code $? >&2; }} | true"
    ended = subprocess.run(
        ["bash", "-c", command],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert ended.stderr.split() == ["code", "0"]
