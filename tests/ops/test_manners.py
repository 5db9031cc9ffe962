from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from ops.fetch import Answer, Fetched, Fetcher, FetchSettings
from ops.manners import Turns, opts_out
from ops.reasons import SUCCESS, Reason, Rejected
from tests.hostile_web import BODY, answer, canned

DEAD = Rejected(Reason.CONNECT)


def turns(per_host: int = 2, longest_hold_s: float = 5, dead_after: int = 3, cool_down_s: float = 0.2) -> Turns[str]:
    return Turns(per_host, longest_hold_s, dead_after, cool_down_s)


def fetcher(tmp_path: Path, **values: object) -> Fetcher:
    settings = {"allow_private": ("127.0.0.0/8",), "deadline_s": 5.0, "backoff_s": 0.01, "robots": False} | values
    return Fetcher(FetchSettings(**settings), resolver=lambda host: ["127.0.0.1"], robots_cache=tmp_path / "robots")


def status(answer: Answer | Exception) -> str:
    assert not isinstance(answer, Exception)
    return str(answer.reason) if isinstance(answer, Rejected) else SUCCESS


def submitted(fetcher: Fetcher, urls: list[str]) -> list[Future[str]]:
    return [fetcher.submit(url, status) for url in urls]


# --- turns -----------------------------------------------------------------------------------------------------------
def test_hosts_take_turns_and_none_is_asked_more_than_its_share() -> None:
    waiting = turns()
    for i in range(3):
        waiting.put("a", f"a{i}")
    waiting.put("b", "b0")
    assert [waiting.take() for _ in range(3)] == [("a", "a0"), ("b", "b0"), ("a", "a1")]
    waiting.put("c", "c0")
    assert waiting.take() == ("c", "c0"), "a has its two"
    waiting.leave("a")
    assert waiting.take() == ("a", "a2")


def test_what_comes_later_comes_at_its_time_and_before_those_who_wait() -> None:
    waiting = turns(per_host=1)
    now = time.monotonic()
    waiting.put("a", "in 0.2 s", not_before=now + 0.2)
    waiting.put("a", "in 0.1 s", not_before=now + 0.1)
    assert waiting.take() == ("a", "in 0.1 s")
    assert time.monotonic() - now >= 0.1
    waiting.put("a", "waits")
    time.sleep(0.2)
    waiting.leave("a")
    assert waiting.take() == ("a", "in 0.2 s")


def test_a_held_host_is_asked_again_at_its_time_while_others_go_on() -> None:
    waiting = turns()
    waiting.put("a", "a0")
    waiting.put("a", "a1")
    assert waiting.take() == ("a", "a0")
    start = time.monotonic()
    waiting.failed("a", DEAD, 0.3)
    waiting.leave("a")
    waiting.put("b", "b0")
    assert waiting.take() == ("b", "b0")
    assert waiting.refusal("a") is None
    assert waiting.take() == ("a", "a1")
    assert 0.3 <= time.monotonic() - start < 3


def test_a_host_that_wants_more_than_we_can_wait_refuses_its_rows_at_once() -> None:
    waiting = turns(longest_hold_s=1)
    for i in range(5):
        waiting.put("a", f"a{i}")
    waiting.take()
    waiting.failed("a", Rejected(Reason.HTTP_429, "", 429), 3600)
    waiting.leave("a")
    for _ in range(4):
        assert waiting.take() is not None
        refusal = waiting.refusal("a")
        assert refusal is not None
        assert (refusal.reason, refusal.http_status) == (Reason.HTTP_429, None)


def test_a_dead_host_is_closed_then_probed_by_one_row_and_opened_by_its_answer() -> None:
    waiting = turns()
    for i in range(9):
        waiting.put("a", f"a{i}")
    for _ in range(3):
        waiting.take()
        waiting.failed("a", DEAD)
        waiting.leave("a")
    assert waiting.refusal("a") == Rejected(Reason.CONNECT, "its host gave no answer many times")
    time.sleep(0.25)
    assert waiting.refusal("a") is None
    waiting.put("b", "b0")
    assert waiting.take() == ("a", "a3")
    assert waiting.take() == ("b", "b0"), "one probe, though two may ask"
    waiting.failed("a", DEAD)
    waiting.leave("a")
    assert waiting.refusal("a"), "one failure more closes it again"
    time.sleep(0.25)
    waiting.take()
    waiting.answered("a")
    waiting.leave("a")
    assert [waiting.take() for _ in range(2)] == [("a", "a5"), ("a", "a6")]


def test_an_answer_now_and_then_keeps_a_host_open_and_0_never_closes_one() -> None:
    for waiting, answers in ((turns(), True), (turns(dead_after=0), False)):
        for i in range(20):
            waiting.put("a", str(i))
            waiting.take()
            waiting.failed("a", DEAD)
            if answers and i % 2:
                waiting.answered("a")
            waiting.leave("a")
            assert waiting.refusal("a") is None


def test_after_the_end_all_that_waits_comes_at_once_and_then_nothing() -> None:
    waiting = turns(per_host=9)
    for i in range(3):
        waiting.put("a", f"a{i}")
    waiting.put("b", "b0", not_before=time.monotonic() + 60)
    waiting.take()
    waiting.failed("a", DEAD, 4)
    takers = [threading.Thread(target=lambda: [None for _ in iter(waiting.take, None)]) for _ in range(3)]
    for taker in takers:
        taker.start()
    waiting.close()
    waiting.put("c", "c0", not_before=time.monotonic() + 60)
    for taker in takers:
        taker.join(5)
        assert not taker.is_alive()


def test_hosts_that_nobody_asks_for_take_no_memory() -> None:
    waiting = turns()
    for i in range(1000):
        waiting.put(f"{i}.example", "row")
        host, _ = waiting.take() or ("", "")
        waiting.answered(host)
        waiting.leave(host)
    assert len(waiting._hosts) == 0


# --- manners on the wire ---------------------------------------------------------------------------------------------
def test_retry_after_holds_a_whole_host_and_leaves_the_others_their_threads(tmp_path: Path) -> None:
    """8 threads, 80 rows of a host that wants to be left alone first in the line, 40 of another one."""

    def busy(head: bytes, number: int) -> Iterator[bytes]:
        time.sleep(0.05)
        yield answer(b"", "Retry-After: 4", status=429) if number <= 4 else BODY

    def calm(head: bytes, number: int) -> Iterator[bytes]:
        time.sleep(0.02)
        yield BODY

    with canned(busy) as a, canned(calm) as b, fetcher(tmp_path, threads=8, deadline_s=15) as asks:
        start = time.monotonic()
        of_a = submitted(asks, [f"http://a.example:{a.port}/{i}" for i in range(80)])
        of_b = submitted(asks, [f"http://b.example:{b.port}/{i}" for i in range(40)])
        assert {row.result() for row in of_b} == {SUCCESS}
        assert time.monotonic() - start < 4, "b was done while a was held"
        assert {row.result() for row in of_a} == {SUCCESS}
    assert a.peak <= 4 + 1  # one may have been read before the server counted it off
    assert a.times[4] - a.times[0] >= 4, "nobody came before the time"
    assert len(a.heads) == 80 + 4


def test_rows_of_a_host_that_is_closed_for_an_hour_end_at_once_as_what_it_said(tmp_path: Path) -> None:
    with canned(answer(b"", "Retry-After: 3600", status=503)) as a, fetcher(tmp_path) as asks:
        start = time.monotonic()
        found = [row.result() for row in submitted(asks, [f"{a.url}/{i}" for i in range(200)])]
        assert time.monotonic() - start < 3
    assert found == ["http_5xx"] * 200
    assert len(a.heads) <= 4


@pytest.mark.parametrize("kind", ["silent", "refused"])
def test_a_dead_host_slows_nobody_and_its_rows_end_with_its_reason(tmp_path: Path, kind: str) -> None:
    silent = threading.Event()
    with canned(lambda head, number: bytes(silent.wait(9))[:0]) as a, canned() as b:
        port = a.port
        if kind == "refused":
            with socket.create_server(("127.0.0.1", 0)) as closed:
                port = closed.getsockname()[1]
        with fetcher(tmp_path, threads=8, retries=0, deadline_s=1.5) as asks:
            start = time.monotonic()
            of_a = submitted(asks, [f"http://a.example:{port}/{i}" for i in range(400)])
            of_b = submitted(asks, [f"http://b.example:{b.port}/{i}" for i in range(100)])
            assert {row.result() for row in of_b} == {SUCCESS}
            assert {row.result() for row in of_a} == {"timeout" if kind == "silent" else "connect"}
            assert time.monotonic() - start < 30, "400 rows, four at a time, 1.5 seconds each, would be 150 s"
        silent.set()
        assert a.accepted <= 12 + 4


def test_a_host_that_comes_back_is_asked_again_after_the_cool_down(tmp_path: Path) -> None:
    is_up = threading.Event()
    with canned(lambda head, number: BODY if is_up.is_set() else b"") as a:
        with fetcher(tmp_path, retries=0, dead_after=3, dead_host_s=0.5) as asks:
            assert {row.result() for row in submitted(asks, [a.url] * 20)} == {"connect"}
            is_up.set()
            assert status(asks.fetch(a.url)) == "connect", "not before its time"
            time.sleep(0.6)
            assert {row.result() for row in submitted(asks, [a.url] * 20)} == {SUCCESS}


def test_a_retry_holds_no_thread(tmp_path: Path) -> None:
    def shy(head: bytes, number: int) -> bytes:
        return BODY if number > 8 else answer(status=500)

    with canned(shy) as a, canned() as b, fetcher(tmp_path, threads=1, backoff_s=0.5, connections_per_host=9) as asks:
        start = time.monotonic()
        of_a = submitted(asks, [f"http://a.example:{a.port}/{i}" for i in range(8)])
        assert status(asks.fetch(f"http://b.example:{b.port}/")) == SUCCESS
        assert time.monotonic() - start < 0.5
        assert {row.result() for row in of_a} == {SUCCESS}


# --- robots.txt ------------------------------------------------------------------------------------------------------
def site(robots: bytes) -> bytes | object:
    return lambda head, number: robots if head.startswith(b"GET /robots.txt ") else BODY


def test_robots_txt_is_asked_once_a_site_and_obeyed(tmp_path: Path) -> None:
    """200 URLs on 5 sites."""
    closed = answer(b"User-agent: *\nDisallow: /closed/")
    with canned(site(closed)) as server, fetcher(tmp_path, robots=True) as asks:
        paths = ["open/", "closed/"] * 20
        rows = {
            f"http://{name}.example:{server.port}/{path}{i}": "robots" if path == "closed/" else SUCCESS
            for name in "abcde"
            for i, path in enumerate(paths)
        }
        found = [row.result() for row in submitted(asks, list(rows))]
        assert found == list(rows.values())
        assert server.paths["/robots.txt"] == 5
        assert sum(server.paths.values()) == 5 + 100
    with fetcher(tmp_path, robots=True) as another:  # a worker of the same node
        assert status(another.fetch(f"http://a.example:{server.port}/closed/x")) == "robots"
    assert server.paths["/robots.txt"] == 5


def test_a_redirect_into_what_is_closed_is_not_followed(tmp_path: Path) -> None:
    def moved(head: bytes, number: int) -> bytes:
        robots = head.startswith(b"GET /robots.txt ")
        return answer(b"User-agent: armchair\nDisallow: /b") if robots else answer(b"", "Location: /b", status=302)

    with canned(moved) as server, fetcher(tmp_path, robots=True) as asks:
        assert status(asks.fetch(server.url + "/a")) == "robots"
    assert server.paths["/b"] == 0


@pytest.mark.parametrize(
    ("robots", "want", "requests"),
    [
        (answer(status=404), SUCCESS, 1),
        (answer(status=403), SUCCESS, 1),
        (answer(b"", "Location: /robots.txt", status=302), SUCCESS, 6),  # five hops, then it counts as not there
        (answer(b"", "Location: http://10.0.0.1/robots.txt", status=302), SUCCESS, 1),
        (answer(b""), SUCCESS, 1),
        (answer(b"<html>Disallow: /", "Content-Type: video/mp4"), SUCCESS, 1),
        (answer(b"User-agent: *\nDisallow: /", "X-Robots-Tag: noindex"), "robots", 1),
        (b"HTTP/1.1 200 OK\r\n\r\nUser-agent: *\nDisallow: /\n" + b"#" * (1 << 20), "robots", 1),
        (answer(b"User-agent: *\nDisallow: /\n" + b"#" * (1 << 20)), "robots", 1),
        (answer(status=500), "http_5xx", 2),
        (answer(status=503), "http_5xx", 2),
        (answer(status=429), "http_429", 2),
        (b"", "connect", 2),
        (answer(b"User-agent", "Content-Length: 99"), "truncated", 2),
    ],
)
def test_a_robots_txt_that_is_not_there_allows_and_one_that_does_not_come_is_transient(
    tmp_path: Path, robots: bytes, want: str, requests: int
) -> None:
    with canned(site(robots)) as server, fetcher(tmp_path, robots=True, retries=1, max_bytes=2000) as asks:
        found = [row.result() for row in submitted(asks, [f"{server.url}/{i}" for i in range(10)])]
    assert found == [want] * 10
    assert server.paths["/robots.txt"] == requests
    assert sum(server.paths.values()) == requests + (10 if want == SUCCESS else 0)


def test_a_robots_txt_that_failed_is_no_knowledge_of_the_node(tmp_path: Path) -> None:
    with canned(lambda head, number: answer(status=503) if number == 1 else BODY) as server:
        with fetcher(tmp_path, robots=True, retries=0) as asks:
            assert status(asks.fetch(server.url)) == "http_5xx"
        with fetcher(tmp_path, robots=True, retries=0) as asks:
            assert status(asks.fetch(server.url)) == SUCCESS


def test_a_robots_txt_that_drips_ends_at_the_deadline(tmp_path: Path) -> None:
    def drips(head: bytes, number: int) -> Iterator[bytes]:
        for _ in range(20):
            yield b"x"
            time.sleep(0.2)

    with canned(drips) as server, fetcher(tmp_path, robots=True, deadline_s=0.6, retries=0) as asks:
        start = time.monotonic()
        assert {row.result() for row in submitted(asks, [server.url] * 5)} == {"timeout"}
        assert time.monotonic() - start < 2.5
    assert server.accepted == 1


def test_a_site_whose_address_is_forbidden_is_not_asked_for_its_robots_txt(tmp_path: Path) -> None:
    with canned() as server, fetcher(tmp_path, robots=True, allow_private=()) as asks:
        assert status(asks.fetch(server.url)) == "address_forbidden"
        assert server.accepted == 0


# --- opting out ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("headers", "is_out"),
    [
        (["X-Robots-Tag: noai"], True),
        (["X-Robots-Tag: NOAI, noimageai"], True),
        (["x-robots-tag:noindex"], True),
        (["X-Robots-Tag: nofollow,noimageindex"], True),
        (["X-Robots-Tag: noml"], True),
        (["X-Robots-Tag: none"], True),
        (["X-Robots-Tag: all", "X-Robots-Tag: noai"], True),
        (["X-Robots-Tag: nofollow; noai"], True),
        (["X-Robots-Tag: nofollow noai"], True),
        (["X-Robots-Tag: armchair: noai"], True),
        (["X-Robots-Tag: Armchair: nofollow, noai"], True),
        (["X-Robots-Tag: *: noindex"], True),
        (["X-Robots-Tag: googlebot: noindex"], False),
        (["X-Robots-Tag: googlebot: noindex, nofollow, noai"], False),
        (["X-Robots-Tag: googlebot: nofollow", "X-Robots-Tag: noai"], True),
        (["X-Robots-Tag: googlebot: noindex, armchair: noai"], True),
        (["X-Robots-Tag: armchair: nofollow, otherbot: noindex"], False),
        (["X-Robots-Tag: unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], True),
        (["X-Robots-Tag: unavailable_after: Friday, 25-Jun-10 15:00:00 UTC, noindex"], True),
        (["X-Robots-Tag: unavailable_after: 2010-06-25T15:00:00+00:00"], False),
        (["X-Robots-Tag: googlebot: unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], False),
        (["X-Robots-Tag: max-image-preview: none, max-snippet: -1"], False),
        (["X-Robots-Tag: max-image-preview:large, noimageindex"], True),
        (["X-Robots-Tag: index, follow, all, noarchive, nosnippet"], False),
        (["X-Robots-Tag: noaistuff, xnoindex"], False),
        (["X-Robots-Tag: "], False),
        (["X-Robots-Tag: ,;:, : ,"], False),
        (["tdm-reservation: 1"], True),
        (["TDM-Reservation:  1 ", "tdm-policy: https://a.example/p"], True),
        (["tdm-reservation: 0"], False),
        (["tdm-reservation: 10"], False),
        (["tdm-reservation: 0", "tdm-reservation: 1"], True),
        (["X-Other: noai"], False),
        ([], False),
    ],
)
def test_each_form_of_a_header_is_understood_before_the_body_is_read(
    tmp_path: Path, headers: list[str], is_out: bool
) -> None:
    def answers(head: bytes, number: int) -> Iterator[bytes]:
        whole = answer(b"hello", *headers)
        yield whole[:-5]
        if is_out:
            gone.wait(4)  # a body that never comes is not waited for
        yield whole[-5:]

    gone = threading.Event()
    with canned(answers) as server, fetcher(tmp_path, deadline_s=3) as asks:
        found = asks.fetch(server.url)
        assert status(found) == ("opt_out" if is_out else SUCCESS)
        gone.set()
        if isinstance(found, Rejected):
            assert found.http_status == 200


def test_who_does_not_ask_for_manners_gets_the_picture(tmp_path: Path) -> None:
    with canned(answer(b"hello", "X-Robots-Tag: noai")) as server, fetcher(tmp_path, opt_out=False) as asks:
        assert isinstance(asks.fetch(server.url), Fetched)


def test_many_lines_of_a_header_cost_no_time() -> None:
    start = time.process_time()
    assert not opts_out(["a:" * 30_000, "," * 60_000, "x: y, " * 10_000], [], "armchair")
    assert time.process_time() - start < 1
