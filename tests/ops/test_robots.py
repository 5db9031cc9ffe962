from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ops import robots
from ops.robots import ALL_ALLOWED, NodeCache, Rules, parse

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "allowed", "closed"),
    [
        (b"", ["/", "/x"], []),
        (b"User-agent: *\nDisallow: /", ["/robots.txt"], ["/", "/x.jpg"]),
        (b"User-agent: *\nDisallow:", ["/", "/x"], []),
        (b"User-agent: *\nDisallow: /a", ["/", "/b/a"], ["/a", "/ab", "/a/b"]),
        (b"\xef\xbb\xbfuser-AGENT : *\r\nDISALLOW : /a # why\r\n", ["/b"], ["/a"]),
        (b"User-agent: *\rDisallow: /a\rDisallow: /b", ["/c"], ["/a", "/b"]),
        (b"Disallow: /a\nUser-agent: *\nDisallow: /b", ["/a"], ["/b"]),
        (b"User-agent: armchair\nDisallow: /a\n\nUser-agent: *\nDisallow: /", ["/b"], ["/a"]),
        (b"User-agent: ArmChair/2.0\nDisallow: /a\nUser-agent: *\nDisallow: /", ["/b"], ["/a"]),
        (b"User-agent: armchairs\nDisallow: /a\nUser-agent: *\nAllow: /", ["/a"], []),
        (b"User-agent: googlebot\nDisallow: /", ["/"], []),
        (b"User-agent: googlebot\nUser-agent: armchair\nDisallow: /a", ["/b"], ["/a"]),
        (b"User-agent: armchair\nDisallow: /a\nUser-agent: x\nDisallow: /b\nUser-agent: armchair\nDisallow: /c",
         ["/b"], ["/a", "/c"]),
        (b"User-agent: armchair\nUser-agent: *\nDisallow: /a", ["/b"], ["/a"]),
        (b"User-agent: armchair\n\nUser-agent: *\nDisallow: /a", ["/b"], ["/a"]),
        (b"User-agent: armchair\nDisallow:\nUser-agent: *\nDisallow: /", ["/b"], []),
        (b"User-agent: armchair\nCrawl-delay: 9\nSitemap: http://a/\nDisallow: /a", ["/b"], ["/a"]),
        (b"User-agent: *\nSitemap: http://a/\nUser-agent: x\nDisallow: /a", [], ["/a"]),
        (b"User-agent: *\nDisallow: /a\nAllow: /a/b", ["/a/b", "/a/bc"], ["/a", "/a/c"]),
        (b"User-agent: *\nAllow: /a\nDisallow: /a", ["/a"], []),
        (b"User-agent: *\nDisallow: /a/b\nAllow: /a", ["/a/c"], ["/a/b"]),
        (b"User-agent: *\nDisallow: /*.jpg$", ["/a.jpg?x", "/a.jpeg", "/jpg"], ["/a.jpg", "/b/c.jpg"]),
        (b"User-agent: *\nDisallow: *.jpg", ["/a"], ["/a.jpg?x"]),
        (b"User-agent: *\nDisallow: /a$", ["/ab", "/a?"], ["/a"]),
        (b"User-agent: *\nDisallow: /$", ["/a"], ["/"]),
        (b"User-agent: *\nDisallow: /a*b*c$", ["/abcd", "/ac"], ["/abc", "/a1b2b3c"]),
        (b"User-agent: *\nDisallow: /*a*a$", ["/a", "/b"], ["/aa", "/a/a"]),
        (b"User-agent: *\nDisallow: /?q=", ["/?p="], ["/?q=1"]),
        (b"User-agent: *\nDisallow: /\xc3\xbc", ["/u"], ["/%C3%BC", "/%c3%bc/x"]),
        (b"User-agent: *\nDisallow: /%C3%bc%7e", ["/~"], ["/%C3%BC~", "/%c3%bc%7E"]),
        (b"User-agent: *\nDisallow: /a%2fb", ["/a/b"], ["/a%2Fb"]),
        (b"User-agent: *\nDisallow: /%2A", ["/ab"], ["/%2a"]),
        (b"<html><title>404: not here</title>\xff\0", ["/"], []),
        (b"User-agent: *\nDisallow: a", ["/a"], []),
    ],
)  # fmt: skip
def test_a_file_closes_what_rfc_9309_says_and_nothing_else(text: bytes, allowed: list[str], closed: list[str]) -> None:
    rules = parse(text)
    assert {path: rules.allow(path) for path in allowed + closed} == {
        path: path in allowed for path in allowed + closed
    }


def test_a_pattern_of_many_stars_costs_no_time() -> None:
    rules = parse(b"User-agent: *\nDisallow: /" + b"*a" * 2000 + b"$")
    start = time.process_time()
    assert rules.allow("/" + "a" * 1999 + "b" * 4000)
    assert not rules.allow("/" + "a" * 4000)
    assert time.process_time() - start < 1


def test_half_a_megabyte_is_read_and_no_more() -> None:
    filler = b"#" * (robots.MAX_BYTES - 60) + b"\n"
    assert not parse(b"User-agent: *\n" + filler + b"Disallow: /a\n").allow("/a")
    assert parse(b"User-agent: *\n" + filler * 2 + b"Disallow: /a\n").allow("/a")


# --- the cache of a node ---------------------------------------------------------------------------------------------
RULES = Rules((("/a", False), ("/%C3%BC*$", True)))


def test_workers_of_a_node_share_what_they_read(tmp_path: Path) -> None:
    one, two = NodeCache(tmp_path / "cache"), NodeCache(tmp_path / "cache")
    assert two.get("http://a.example") is None
    one.put("http://a.example", RULES)
    one.put("http://b.example", ALL_ALLOWED)
    assert (two.get("http://a.example"), two.get("http://b.example")) == (RULES, ALL_ALLOWED)
    assert two.get("http://a.example:8080") is two.get("https://a.example") is None
    one.close()
    two.close()
    assert two.get("http://a.example") is None


@pytest.mark.parametrize("later_s", [robots.TTL_S + 1, -60.0])
def test_what_is_older_than_an_hour_or_from_the_future_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later_s: float
) -> None:
    cache, now = NodeCache(tmp_path / "cache"), time.time()
    cache.put("http://a.example", RULES)
    monkeypatch.setattr(time, "time", lambda: now + later_s)
    assert cache.get("http://a.example") is None
    cache.close()


def test_old_sites_take_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, now = NodeCache(tmp_path / "cache"), time.time()
    cache.put("http://a.example", RULES)
    cache.close()
    monkeypatch.setattr(time, "time", lambda: now + 2 * robots.TTL_S)
    again = NodeCache(tmp_path / "cache")
    again.put("http://b.example", RULES)
    again.close()
    with sqlite3.connect(tmp_path / "cache" / "robots-1.sqlite3") as database:
        assert database.execute("SELECT site FROM robots").fetchall() == [("http://b.example",)]
    database.close()


@pytest.mark.parametrize("harm", ["torn", "garbage", "deleted", "emptied", "closed"])
def test_a_harmed_cache_is_no_cache_and_then_a_new_one(tmp_path: Path, harm: str) -> None:
    directory = tmp_path / "cache"
    path = directory / "robots-1.sqlite3"
    cache = NodeCache(directory)
    for i in range(300):
        cache.put(f"http://{i}.example", RULES)
    cache.close()
    if harm == "torn":
        os.truncate(path, path.stat().st_size // 2)
    elif harm == "garbage":
        path.write_bytes(b"\xff" * 9000)
    elif harm == "deleted":
        path.unlink()
    elif harm == "emptied":
        os.truncate(path, 0)
    else:
        directory.chmod(0o777)  # anybody may write: not believed
    harmed = NodeCache(directory)
    assert all(harmed.get(f"http://{i}.example") in (None, RULES) for i in range(300))
    harmed.put("http://a.example", RULES)
    harmed.close()
    new = NodeCache(directory)
    new.put("http://b.example", RULES)
    assert new.get("http://b.example") == (None if harm == "closed" else RULES)
    new.close()


def test_a_killed_writer_leaves_a_cache_that_others_read(tmp_path: Path) -> None:
    program = """
import itertools, sys
from pathlib import Path
from ops.robots import NodeCache, Rules
cache = NodeCache(Path(sys.argv[1]))
for i in itertools.count():
    cache.put(f"http://{i}.example", Rules((("/a" * (i % 300), False),)))
    print(i, flush=True)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "cache")]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        last = [int(line) for line, _ in zip(writer.stdout, range(500), strict=False)][-1]
        writer.send_signal(signal.SIGKILL)
    cache = NodeCache(tmp_path / "cache")
    assert all(cache.get(f"http://{i}.example") for i in range(last + 1))
    cache.close()
