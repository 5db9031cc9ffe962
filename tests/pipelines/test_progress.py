from __future__ import annotations

import time

import pytest

from pipelines.progress import Progress


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("verify") as progress:
        progress.tell("shards", 1, 2)
    assert capsys.readouterr().err == ""


def test_long_work_says_how_far_it_is_also_when_it_counts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[tuple[float | None, str]] = []
    with Progress("verify", every_s=0.02, show=lambda share, line: shown.append((share, line))) as progress:
        time.sleep(0.1)
        progress.tell("shards", 3, 12)
        time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("verify      0 s")
    assert lines[-1].startswith("verify      3/12 shards")
    assert shown[-1][0] == 0.25


def test_a_stage_always_has_a_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("ingest", always=True) as progress:
        progress.tell("shards", 2, 2)
        progress.tell("pairs", 1500, 1500)
        progress.note = "78 % kept"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ingest      2/2 shards   1,500/1,500 pairs   78 % kept   ")


def test_rate_and_time_left_are_of_the_finest_count_whose_total_is_known() -> None:
    progress = Progress("ingest")
    progress._began_s -= 10.0
    progress.tell("shards", 0, 4)
    progress.tell("pairs", 100, 400)
    assert progress.line() == (0.25, "0/4 shards   100/400 pairs   10 pairs/s   30 s left")
    progress.tell("bytes", 50_000_000)
    assert progress.line()[1] == "0/4 shards   100/400 pairs   50.0 MB   10 pairs/s   5.0 MB/s   30 s left"


def test_work_that_fails_has_no_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="disk"), Progress("ingest", always=True):
        raise OSError("disk")
    assert capsys.readouterr().err == ""
