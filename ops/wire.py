"""http.client, made strict about heads and bodies that were cut; connections that do not dial; one SSLContext.

Used by ops/fetch.py alone, which says what is asked and what an answer means.
"""

from __future__ import annotations

import io
import socket
import ssl
import threading
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import BadStatusLine, HTTPConnection, HTTPResponse, HTTPSConnection, IncompleteRead

from ops.addresses import Target


class _Lines(io.BufferedReader):
    """Remembers the last line that was not nothing: http.client takes the end of the connection for an empty line."""

    last = b""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self.last = line or self.last
        return line


class Response(HTTPResponse):
    """Raises IncompleteRead for a head, or for chunks, that the end of the connection cut."""

    def __init__(self, sock: socket.socket, debuglevel: int = 0, method: str | None = None, url: str | None = None):
        super().__init__(sock, debuglevel, method, url)
        self.fp = self._lines = _Lines(self.fp.detach())

    def begin(self) -> None:
        try:
            super().begin()
        except BadStatusLine as error:
            line = self._lines.last
            if line.startswith(b"HTTP/1."[: len(line)]) and line and not line.endswith(b"\n"):
                raise IncompleteRead(b"") from error
            raise
        # An error's status says all that we want to know of it.
        if self._lines.last not in (b"\r\n", b"\n") and self.status < 400:
            raise IncompleteRead(b"")

    def read1(self, n: int = -1) -> bytes:
        data = super().read1(n)
        if not data and self.chunked and not self._lines.last.endswith(b"\n"):  # "0" of "0a00\r\n"
            raise IncompleteRead(b"")
        return data


def connection_to(target: Target, context: ssl.SSLContext) -> HTTPConnection:
    """A connection without a socket: it knows the Host header and must not dial by itself."""
    if target.scheme == "https":
        connection: HTTPConnection = HTTPSConnection(target.host, target.port, context=context)
    else:
        connection = HTTPConnection(target.host, target.port)
    connection.auto_open = 0
    connection.response_class = Response
    return connection


def retry_after_s(retry_after: str | None) -> float:
    """Retry-After as seconds from now, a day at most: a number or a date; 0 without one."""
    wanted = 0.0
    with suppress(ValueError, OverflowError):
        try:
            wanted = float(retry_after or 0)
        except ValueError:
            wanted = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
    return min(86_400.0, max(0.0, wanted))


_ssl_context: ssl.SSLContext | None = None
_ssl_lock = threading.Lock()


def shared_ssl_context() -> ssl.SSLContext:
    """One context a process: building one costs 30 ms of CPU, more than all else that is done for a picture."""
    global _ssl_context
    with _ssl_lock:
        if _ssl_context is None:
            _ssl_context = ssl.create_default_context()
        return _ssl_context
