from __future__ import annotations

import socket
import time
from email.utils import formatdate
from http.client import IncompleteRead, NotConnected

import pytest

from ops.addresses import Target
from ops.wire import Response, connection_to, retry_after_s, shared_ssl_context


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0), ("", 0), ("0", 0), ("2", 2), (" 2 ", 2), ("1.5", 1.5), ("-3", 0), ("soon", 0), ("nan", 0),
        ("inf", 86_400), ("1e400", 86_400), ("99999999", 86_400), ("Wed, 99 Foo 2026 25:00:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_between_now_and_tomorrow(header: str | None, seconds: float) -> None:
    assert retry_after_s(header) == seconds


def test_retry_after_may_be_a_date() -> None:
    assert 28 < retry_after_s(formatdate(time.time() + 30, usegmt=True)) <= 30


@pytest.mark.parametrize(
    ("data", "is_whole"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", True),
        (b"HTTP/1.1 404 Not Fo", True),  # an error's status says enough
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0", False),
        (b"HTTP/1.1 2", False),
    ],
)
def test_a_head_that_the_end_of_the_connection_cut_is_no_head(data: bytes, is_whole: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        with Response(ours, method="GET") as response:
            if is_whole:
                response.begin()
                assert response.status in (200, 404)
            else:
                with pytest.raises(IncompleteRead):
                    response.begin()


def test_a_connection_does_not_dial_by_itself() -> None:
    for scheme in ("http", "https"):
        connection = connection_to(Target(scheme, "a.example", 81, "/"), shared_ssl_context())
        with pytest.raises(NotConnected):
            connection.request("GET", "/")


def test_a_process_has_one_ssl_context() -> None:
    assert shared_ssl_context() is shared_ssl_context()
