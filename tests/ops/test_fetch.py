from __future__ import annotations

import gzip
import random
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest
import trustme
from pydantic import ValidationError

from ops import demo_web
from ops.fetch import Fetched, Fetcher, FetchSettings, _No
from ops.filters import FilterSettings, judge_header, judge_pixels
from ops.limits import Clock, Room
from ops.pictures import Header, decode, read_header
from ops.reasons import SUCCESS, Rejected
from tests.hostile_web import BODY, canned

LOOPBACK = ("127.0.0.0/8",)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[demo_web.DemoWeb]:
    with demo_web.serve(tmp_path_factory.mktemp("pictures")) as web:
        yield web


def settings(**values: object) -> FetchSettings:
    return FetchSettings(**{"allow_private": LOOPBACK, "deadline_s": 5.0, "backoff_s": 0.01, "robots": False} | values)


def reason(answer: Fetched | Rejected) -> str:
    return str(answer.reason) if isinstance(answer, Rejected) else SUCCESS


# --- the hostile web -------------------------------------------------------------------------------------------------
def status_of(fetcher: Fetcher, url: str) -> str:
    """One pair's way from URL to pixels: the order of ops/ingest.py in small."""
    answer = fetcher.fetch(url)
    if isinstance(answer, Rejected):
        return str(answer.reason)
    header = read_header(answer.data)
    answer.release()
    rejected = header if isinstance(header, Rejected) else judge_header(header, FilterSettings())
    if rejected is None:
        assert isinstance(header, Header)
        pixels = decode(answer.data, header, 384)
        rejected = pixels if isinstance(pixels, Rejected) else judge_pixels(pixels, FilterSettings())
    return str(rejected.reason) if rejected else SUCCESS


def test_each_way_to_misbehave_ends_as_promised(tmp_path: Path) -> None:
    for draw in demo_web._PICTURES.values():  # imports of the drawing libraries are no slowness of the web
        draw(0)
    with demo_web.serve(tmp_path) as web:
        with Fetcher(FetchSettings(allow_private=LOOPBACK, deadline_s=4, connections_per_host=64)) as fetcher:
            with ThreadPoolExecutor(len(demo_web.HOSTILE)) as pool:
                statuses = pool.map(lambda kind: status_of(fetcher, f"{web.url}/hostile/{kind}/1"), demo_web.HOSTILE)
                assert dict(zip(demo_web.HOSTILE, statuses, strict=True)) == demo_web.HOSTILE
    asked = {path.split("/")[2]: n for path, n in web.counts().items() if path.startswith("/hostile")}
    assert asked["broken"] == 3
    assert asked["heals"] == asked["retry_after"] == 2
    assert asked["missing"] == asked["corrupt"] == asked["bomb"] == 1


@pytest.mark.parametrize("kind", ["dripped_headers", "slow", "silent"])
def test_an_answer_that_drips_ends_at_the_deadline(web: demo_web.DemoWeb, kind: str) -> None:
    with Fetcher(settings(deadline_s=0.8)) as fetcher:
        start = time.monotonic()
        assert reason(fetcher.fetch(f"{web.url}/hostile/{kind}/deadline")) == "timeout"
        assert 0.7 < time.monotonic() - start < 2.8


def test_no_answer_makes_fetch_raise() -> None:
    """Answers cut, flipped and spliced at random: each is a body or a reason."""
    wholes = [
        BODY,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3;x=y\r\nyou\r\n0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: //[\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 429 Slow\r\nRetry-After: Wed, 99 Foo 2026 25:00:00 GMT\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b"hello" * 50),
    ]

    def answer(head: bytes, number: int) -> bytes:
        rng = random.Random(number)
        data = bytearray(rng.choice(wholes))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data)

    with canned(answer) as server, Fetcher(settings(retries=0, deadline_s=2)) as fetcher:
        seen = {reason(fetcher.fetch(server.url + "/x")) for _ in range(400)}
    assert {SUCCESS, "truncated", "redirect_forbidden", "http_429", "http_status"} <= seen


# --- addresses and names ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{p}/", "http://2130706433:{p}/", "http://0x7f.1:{p}/", "http://localhost:{p}/",
            "http://[::ffff:127.0.0.1]:{p}/", "http://１２７.0.0.1:{p}/"],
)  # fmt: skip
def test_our_own_network_is_never_connected_to(url: str) -> None:
    with canned() as server, Fetcher(FetchSettings()) as fetcher:
        assert reason(fetcher.fetch(url.format(p=server.port))) == "address_forbidden"
        assert server.heads == []


def test_the_connection_goes_to_the_checked_address_with_the_name_of_the_host() -> None:
    """DNS rebinding: the second answer of the resolver would be a forbidden address; nobody asks for it."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    with canned() as server, Fetcher(settings(), resolver=lambda host: next(answers)) as fetcher:
        assert reason(fetcher.fetch(f"http://rebinding.example:{server.port}/a")) == SUCCESS
        assert b"\r\nHost: rebinding.example:%d\r\n" % server.port in server.heads[0]


def test_one_forbidden_address_spoils_a_name() -> None:
    with canned() as server, Fetcher(settings(), resolver=lambda host: ["127.0.0.1", "10.0.0.1"]) as fetcher:
        assert reason(fetcher.fetch(f"http://both.example:{server.port}/")) == "address_forbidden"
        assert server.heads == []


def test_the_next_address_of_a_name_is_tried_when_the_first_is_dead() -> None:
    with canned() as server, Fetcher(settings(retries=0), resolver=lambda host: ["127.0.0.9", "127.0.0.1"]) as fetcher:
        assert reason(fetcher.fetch(f"http://two.example:{server.port}/")) == SUCCESS


def test_many_threads_that_want_one_name_ask_the_resolver_once() -> None:
    asked = []

    def resolver(host: str) -> list[str]:
        asked.append(host)
        time.sleep(0.2)
        return ["127.0.0.1"]

    with canned() as server, Fetcher(settings(connections_per_host=32), resolver=resolver) as fetcher:
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(fetcher.fetch, [f"http://one.example:{server.port}/{i}" for i in range(64)]))
    assert [reason(answer) for answer in answers] == [SUCCESS] * 64
    assert asked == ["one.example"]


def test_a_missing_name_and_a_failing_resolver_are_two_reasons_and_only_the_first_is_believed() -> None:
    asked = []

    def resolver(host: str) -> list[str]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME if host == "none.example" else socket.EAI_AGAIN, "")

    with Fetcher(settings(), resolver=resolver) as fetcher:
        for _ in range(2):
            assert reason(fetcher.fetch("http://none.example/")) == "dns_no_such_host"
        assert reason(fetcher.fetch("http://again.example/")) == "dns_failure"
    assert asked == ["none.example"] + ["again.example"] * 3


def test_names_do_not_queue_for_a_thread_of_the_resolver() -> None:
    together = threading.Barrier(24)

    def resolver(host: str) -> list[str]:
        together.wait(3)
        return ["127.0.0.1"]

    with canned() as server, Fetcher(settings(threads=24, retries=0), resolver=resolver) as fetcher:
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(fetcher.fetch, [f"http://n{i}.example:{server.port}/" for i in range(24)]))
    assert [reason(answer) for answer in answers] == [SUCCESS] * 24


def test_a_resolver_that_hangs_costs_the_deadline_and_no_more() -> None:
    wake = threading.Event()
    with Fetcher(settings(deadline_s=0.4), resolver=lambda host: [str(wake.wait(5))]) as fetcher:
        start = time.monotonic()
        assert reason(fetcher.fetch("http://slow.example/")) == "timeout"
        assert time.monotonic() - start < 3
        wake.set()


# --- URLs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "why"),
    [
        *[(url, "url_invalid") for url in (
            "", "picture.jpg", "//a.example/x", "http://", "http:///x", "http://a.example:0/", "http://a.example:99999/",
            "http://a..example/", "http://" + "a" * 70 + ".example/", "http://[::1/", "http://a b.example/",
            "http://me:pw@a.example/", "http://a.example/\ud800", "http://a.example/" + "x" * 9000,
        )],
        *[(url, "url_scheme") for url in (
            "file:///etc/hostname", "data:image/png;base64,xx", "ftp://a.example/x", "javascript:alert(1)",
        )],
    ],
)  # fmt: skip
def test_what_is_no_web_address_is_rejected_without_a_request(url: str, why: str) -> None:
    with Fetcher(settings()) as fetcher:
        assert reason(fetcher.fetch(url)) == why


def test_settings_that_no_request_could_use_are_refused_at_once() -> None:
    for bad in ({"allow_private": ("127.0.0.1/8",)}, {"contact": "a\r\nb"}, {"deadline_s": 0}, {"timeout": 3}):
        with pytest.raises(ValidationError):
            FetchSettings(**bad)


def test_the_request_says_who_asks() -> None:
    with canned() as server, Fetcher(settings(contact="https://lab.example/armchair")) as fetcher:
        fetcher.fetch(server.url)
    assert b"\r\nUser-Agent: armchair/0.1 (+https://lab.example/armchair)\r\n" in server.heads[0]


# --- redirects -------------------------------------------------------------------------------------------------------
def test_redirects_are_followed_up_to_the_limit_and_not_further() -> None:
    def answer(head: bytes, number: int) -> bytes:
        hop = int(head.split(b" ")[1].strip(b"/"))
        return BODY if hop == 0 else b"HTTP/1.1 302 Found\r\nLocation: %d\r\nContent-Length: 0\r\n\r\n" % (hop - 1)

    with canned(answer) as server, Fetcher(settings()) as fetcher:
        answer_5 = fetcher.fetch(server.url + "/5")
        assert isinstance(answer_5, Fetched)
        assert answer_5.final_url == server.url + "/0"
        assert reason(fetcher.fetch(server.url + "/6")) == "redirect_limit"
        assert len(server.heads) == 6 + 6


def test_a_location_in_utf_8_is_understood() -> None:
    def answer(head: bytes, number: int) -> bytes:
        return BODY if number == 2 else "HTTP/1.1 301 M\r\nLocation: /ü b.jpg\r\nContent-Length: 0\r\n\r\n".encode()

    with canned(answer) as server, Fetcher(settings()) as fetcher:
        assert reason(fetcher.fetch(server.url)) == SUCCESS
        assert server.heads[1].startswith(b"GET /%C3%BC%20b.jpg HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "location",
    ["http://10.0.0.1/", "http://[::1]/", "ftp://a.example/x", "data:image/png,", "http://name.example/", "//["],
)
def test_a_redirect_is_checked_like_the_first_url(location: str) -> None:
    head = f"HTTP/1.1 307 Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    with canned(head) as server, Fetcher(settings(), resolver=lambda host: ["192.168.0.1"]) as fetcher:
        assert reason(fetcher.fetch(server.url)) == "redirect_forbidden"
        assert len(server.heads) == 1


# --- bodies ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("head", "body", "want"),
    [
        ("Content-Length: 9", b"hello", "truncated"),
        ("Transfer-Encoding: chunked", b"5\r\nhello\r\n", "truncated"),
        ("Transfer-Encoding: chunked", b"5\r\nhel", "truncated"),
        ("Content-Length: 3", b"hello", b"hel"),
        ("X: y", b"hello", b"hello"),
        ("Transfer-Encoding: chunked", b"5\r\nhello\r\n2\r\n, \r\n3;x=1\r\nyou\r\n0\r\n\r\n", b"hello, you"),
        ("Content-Encoding: gzip", gzip.compress(b"hello"), b"hello"),
        ("Content-Encoding: deflate", zlib.compress(b"hello"), b"hello"),
        ("Content-Encoding: gzip", gzip.compress(b"hello")[:-9], "truncated"),
        ("Content-Encoding: gzip", b"hello, I am no gzip", "decode"),
        ("Content-Encoding: gzip", gzip.compress(b"x" * 1001), "too_large"),
        ("Content-Encoding: gzip", gzip.compress(b"x" * 1000), b"x" * 1000),
        ("Content-Encoding: br", b"hello", "content_type"),
        ("Content-Length: 1001", b"", "too_large"),
        ("X: y", b"x" * 1001, "too_large"),
        ("Content-Length: 0", b"", "empty"),
        ("Content-Type: VIDEO/mp4\r\nContent-Length: 5", b"hello", "content_type"),
    ],
)
def test_bodies_end_as_their_bytes_or_as_the_reason(head: str, body: bytes, want: bytes | str) -> None:
    with canned(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body) as server:
        with Fetcher(settings(max_bytes=1000, retries=0)) as fetcher:
            answer = fetcher.fetch(server.url)
            got = answer.data if isinstance(answer, Fetched) else reason(answer)
            assert got == want
            assert isinstance(want, str) or answer.http_status == 200


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTT", "truncated"),
        (b"HTTP/1.1 20", "truncated"),
        (b"HTTP/1.1 200 OK\r\n", "truncated"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "truncated"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n", "truncated"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\n", "truncated"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0", "truncated"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n", "truncated"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "truncated"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0", "truncated"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n00", "truncated"),
        (b"HTTP/1.1 302 Found\r\nServer: x\r\n", "truncated"),
        (b"HTTP/1.1 302 Found\r\nLocation: /pict", "truncated"),
        (b"HTTP/1.1 302 Found\r\nServer: x\r\n\r\n", "http_status"),
        (b"HTTP/1.1 404 Not Fo", "http_4xx"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "empty"),
        (b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", "empty"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "empty"),
        (b"SSH-2.0-x", "http_status"),
        (b"", "connect"),
    ],
)
def test_what_the_end_of_the_connection_cut_is_no_permanent_rejection(data: bytes, why: str) -> None:
    with canned(data) as server, Fetcher(settings(retries=0)) as fetcher:
        assert reason(fetcher.fetch(server.url)) == why


def test_an_answer_that_was_cut_in_its_head_is_asked_for_again() -> None:
    with canned(lambda head, number: BODY if number == 2 else BODY[:24]) as server, Fetcher(settings()) as fetcher:
        assert reason(fetcher.fetch(server.url)) == SUCCESS


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (204, "empty"), (300, "http_status"), (304, "http_status"), (400, "http_4xx"), (408, "http_408"),
        (425, "http_425"), (429, "http_429"), (500, "http_5xx"), (599, "http_5xx"), (700, "http_status"),
    ],
)  # fmt: skip
def test_a_status_gives_its_reason_and_is_recorded(status: int, why: str) -> None:
    with canned(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status) as server:
        with Fetcher(settings(retries=0)) as fetcher:
            answer = fetcher.fetch(server.url)
            assert (reason(answer), answer.http_status) == (why, status)


def test_the_budget_of_bytes_holds_back_bodies_until_others_are_released(web: demo_web.DemoWeb) -> None:
    with Fetcher(settings(bytes_in_flight=20_000, connections_per_host=16)) as fetcher:
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(fetcher.fetch, f"{web.url}/generated/{i}.jpg") for i in range(8)]
            time.sleep(0.3)
            held = 0
            while jobs:
                done = [job for job in jobs if job.done()]
                answers = [job.result() for job in done]
                assert all(isinstance(answer, Fetched) for answer in answers)
                held = sum(len(answer.data) for answer in answers)  # nothing before it was kept
                assert held <= 20_000
                for answer in answers:
                    answer.release()
                    answer.release()  # twice does no harm
                jobs = [job for job in jobs if job not in done]
                time.sleep(0.1)
        assert held


def test_a_budget_that_nobody_frees_ends_as_timeout_and_not_as_a_hang() -> None:
    """At the shard's deadline, not at the row's: the wait is ours."""
    with canned() as server, Fetcher(settings(bytes_in_flight=7, deadline_s=0.5, retries=0)) as fetcher:
        first = fetcher.fetch(server.url)
        assert isinstance(first, Fetched)
        start = time.monotonic()
        assert reason(fetcher.fetch(server.url, not_after=start + 0.2)) == "timeout"
        assert time.monotonic() - start < 0.45
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(fetcher.fetch, server.url)
            time.sleep(0.8)
            first.release()
            assert reason(job.result()) == SUCCESS


def test_closing_ends_the_wait_for_room_in_the_budget() -> None:
    with canned() as server, ThreadPoolExecutor(1) as pool:
        with Fetcher(settings(bytes_in_flight=7, deadline_s=8, retries=0)) as fetcher:
            first = fetcher.fetch(server.url)
            assert isinstance(first, Fetched)
            job = pool.submit(fetcher.fetch, server.url)
            time.sleep(0.3)
        assert reason(job.result(timeout=3)) == "timeout"


def test_a_row_whose_time_is_over_does_not_wait_for_room() -> None:
    with canned() as server, Fetcher(settings(bytes_in_flight=7)) as fetcher:
        first = fetcher.fetch(server.url)
        assert isinstance(first, Fetched)
        with fetcher._reaper.watch(0) as watch:
            watch.expire()
            with pytest.raises(_No) as no:
                fetcher._take_room(Room(), 5, Clock(5, time.monotonic() + 5), watch, is_whole=True)
        assert no.value.rejected.detail == "body"


def test_slow_bodies_of_unknown_length_leave_room_for_others() -> None:
    """With default limits: eight that reserved the largest body each would fill the budget."""
    go_on = threading.Event()

    def answer(head: bytes, number: int) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n\r\nhel"
        if b"/slow" in head:
            go_on.wait(5)
        yield b"lo"

    limits = settings(deadline_s=4, retries=0, connections_per_host=32)
    with canned(answer) as server, Fetcher(limits) as fetcher, ThreadPoolExecutor(24) as pool:
        jobs = [pool.submit(fetcher.fetch, server.url + "/slow") for _ in range(16)]
        time.sleep(0.5)
        assert reason(fetcher.fetch(server.url, not_after=time.monotonic() + 1.5)) == SUCCESS
        go_on.set()
        assert [reason(job.result()) for job in jobs] == [SUCCESS] * 16


def test_bodies_that_outgrow_the_budget_together_all_come_to_their_end_within_it() -> None:
    """Twelve of 3 MB, of unknown length, or out of a gzip, in 9 MB: first pieces of all, then none could grow."""
    plain = b"HTTP/1.1 200 OK\r\n\r\n" + bytes(3 << 20)
    zipped = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(3 << 20)) + b"more"
    limits = settings(max_bytes=4 << 20, bytes_in_flight=9 << 20, connections_per_host=16, retries=0)
    least = 9 << 20

    def fetched(i: int) -> int:
        nonlocal least
        answer = fetcher.fetch(server.url, not_after=time.monotonic() + 10)
        assert isinstance(answer, Fetched)
        least = min(least, fetcher._budget._free)
        answer.release()
        return len(answer.data)

    def answer(head: bytes, number: int) -> Iterator[bytes]:
        whole = zipped if number % 2 else plain
        yield whole[:200]
        time.sleep(0.5)  # who gets a first piece has it by now
        yield whole[200:]

    with canned(answer) as server, Fetcher(limits) as fetcher:
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(fetched, range(12))) == [3 << 20] * 12
        assert least >= 0
        assert fetcher._budget._free == 9 << 20


def test_a_body_larger_than_the_whole_budget_passes_when_it_is_alone() -> None:
    with canned() as server, Fetcher(settings(bytes_in_flight=3)) as fetcher:
        assert reason(fetcher.fetch(server.url)) == SUCCESS


# --- manners ---------------------------------------------------------------------------------------------------------
def test_a_host_is_asked_by_no_more_than_its_share_while_others_go_on() -> None:
    def answer(head: bytes, number: int) -> bytes:
        time.sleep(0.1)
        return BODY

    with canned(answer) as one, canned(answer) as two:
        with Fetcher(settings(connections_per_host=3), resolver=lambda host: ["127.0.0.1"]) as fetcher:
            urls = [f"http://one.example:{one.port}/"] * 15 + [f"http://two.example:{two.port}/"] * 15
            with ThreadPoolExecutor(30) as pool:
                assert {reason(answer) for answer in pool.map(fetcher.fetch, urls)} == {SUCCESS}
    assert (one.peak, two.peak) == (3, 3)
    assert two.times[0] < one.times[-1]
    assert one.times[0] < two.times[-1]


def test_waiting_for_ones_turn_at_a_host_is_not_counted_as_its_slowness() -> None:
    def answer(head: bytes, number: int) -> bytes:
        time.sleep(0.4)
        return BODY

    with canned(answer) as server, Fetcher(settings(connections_per_host=1, deadline_s=1, retries=0)) as fetcher:
        with ThreadPoolExecutor(4) as pool:
            assert [reason(a) for a in pool.map(fetcher.fetch, [server.url] * 4)] == [SUCCESS] * 4


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for(as_date: bool) -> None:
    def answer(head: bytes, number: int) -> bytes:
        when = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
        return BODY if number == 2 else f"HTTP/1.1 503 X\r\nRetry-After: {when}\r\nContent-Length: 0\r\n\r\n".encode()

    with canned(answer) as server, Fetcher(settings()) as fetcher:
        assert reason(fetcher.fetch(server.url)) == SUCCESS
        assert 0.95 < server.times[1] - server.times[0] < 3  # a date has whole seconds


def test_back_off_doubles_and_what_is_permanent_is_asked_once() -> None:
    with canned(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n") as server:
        with Fetcher(settings(backoff_s=0.2)) as fetcher:
            assert reason(fetcher.fetch(server.url)) == "http_5xx"
        first, second = (b - a for a, b in zip(server.times, server.times[1:], strict=False))
        assert first >= 0.2
        assert second >= 0.4
    with canned(b"HTTP/1.1 410 X\r\nContent-Length: 0\r\n\r\n") as server, Fetcher(settings()) as fetcher:
        fetcher.fetch(server.url)
        assert len(server.heads) == 1


def test_a_refused_connection_is_connect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Fetcher(settings()) as fetcher:
        assert reason(fetcher.fetch(f"http://127.0.0.1:{port}/")) == "connect"


def test_a_host_that_takes_no_connection_is_given_up_after_connect_s() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:  # the queue is full: the kernel drops who comes next
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        start = time.monotonic()
        with Fetcher(settings(connect_s=0.3, retries=1)) as fetcher:
            assert reason(fetcher.fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/")) == "connect"
        assert 0.6 <= time.monotonic() - start < 3
        for client in waiting:
            client.close()


def test_closing_ends_open_requests_at_once() -> None:
    with canned(lambda head, number: time.sleep(5) or b"") as server, ThreadPoolExecutor(3) as pool:
        with Fetcher(settings(connections_per_host=2)) as fetcher:
            jobs = [pool.submit(fetcher.fetch, server.url) for _ in range(3)]  # the third waits for its turn
            time.sleep(0.3)
        start = time.monotonic()
        assert [reason(job.result()) for job in jobs] == ["timeout"] * 3
        assert time.monotonic() - start < 3


def test_a_shards_own_deadline_ends_a_row_early() -> None:
    with canned(lambda head, number: time.sleep(3) or b"") as server, Fetcher(settings()) as fetcher:
        start = time.monotonic()
        assert reason(fetcher.fetch(server.url, not_after=start + 0.5)) == "timeout"
        assert reason(fetcher.fetch(server.url, not_after=start)) == "timeout"
        assert time.monotonic() - start < 2.5


# --- https -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def contexts(authority: trustme.CA, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server, client)."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(name).configure_cert(server)
    authority.configure_trust(client)
    return server, client


def test_https_speaks_with_the_name_of_the_host_to_the_checked_address(authority: trustme.CA) -> None:
    server_context, client_context = contexts(authority, "secure.example")
    names = []
    server_context.sni_callback = lambda sock, name, context: names.append(name)
    with canned(context=server_context) as server:
        with Fetcher(settings(), ssl_context=client_context, resolver=lambda host: ["127.0.0.1"]) as fetcher:
            answer = fetcher.fetch(f"https://secure.example:{server.port}/x")
            assert isinstance(answer, Fetched)
            assert (answer.data, answer.final_url) == (b"hello", f"https://secure.example:{server.port}/x")
    assert names == ["secure.example"]
    assert b"\r\nHost: secure.example:%d\r\n" % server.port in server.heads[0]


def test_a_certificate_that_is_wrong_or_of_nobody_we_trust_is_tls_and_asked_once(authority: trustme.CA) -> None:
    server_context, client_context = contexts(authority, "secure.example")
    with canned(context=server_context) as server:
        for context, name in ((client_context, "other.example"), (None, "secure.example")):
            with Fetcher(settings(), ssl_context=context, resolver=lambda host: ["127.0.0.1"]) as fetcher:
                answer = fetcher.fetch(f"https://{name}:{server.port}/")
                assert isinstance(answer, Rejected)
                assert (answer.reason, answer.detail) == ("tls", "certificate")
        assert (server.accepted, server.heads) == (2, [])


def test_a_handshake_that_never_ends_and_a_body_that_drips_over_tls_end_at_the_deadline(authority: trustme.CA) -> None:
    server_context, client_context = contexts(authority, "127.0.0.1")
    with Fetcher(settings(deadline_s=0.6), ssl_context=client_context) as fetcher:
        with socket.create_server(("127.0.0.1", 0)) as listener:  # takes the connection, says nothing
            start = time.monotonic()
            answer = fetcher.fetch(f"https://127.0.0.1:{listener.getsockname()[1]}/")
            assert reason(answer) == "timeout"
            assert time.monotonic() - start < 2.5

        def answer_late(head: bytes, number: int) -> bytes:
            time.sleep(3)
            return BODY

        with canned(answer_late, context=server_context) as server:
            start = time.monotonic()
            assert reason(fetcher.fetch(server.url)) == "timeout"
            assert time.monotonic() - start < 2.5


def test_fetchers_of_one_process_share_the_systems_ssl_context() -> None:
    with Fetcher(settings()) as one, Fetcher(settings()) as two:
        assert one._ssl_context is two._ssl_context
