"""From a URL to bytes: one request with its redirects, limits and manners. Threads, http.client, one SSLContext.

Lives here: address checks at each hop, deadlines, byte limits, retries. Not here: what a URL or an address means
(ops/addresses.py), what the bytes are (ops/pictures.py), whether we want them (ops/filters.py), which rows to ask for
and in how many threads (ops/ingest.py).

What the web may try, and what stops it:

    an address inside our network, also        every address of a name is checked, at every redirect, and the
    by a redirect or a second DNS answer       connection goes to a checked address, never to the name again
    a byte of the headers now and then         a per-operation timeout never fires: the reaper shuts the socket
    a body without end, a gzip bomb            `max_bytes`, counted on what comes out of the inflater
    many large bodies at once                  `bytes_in_flight`, reserved before the bytes are kept
    a Content-Length that lies, a head that    `truncated`
    the end of the connection cuts

Proxies of the environment (http_proxy) are not used: a proxy resolves names itself, past the address check.
"""

from __future__ import annotations

import io
import ipaddress
import math
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from http.client import BadStatusLine, HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from types import TracebackType
from typing import Annotated
from urllib.parse import urljoin

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from ops.addresses import Names, Resolver, Target, is_public, normal_url, says_no_such_host, system_resolver
from ops.reasons import Reason, Rejected, is_transient


def _network(text: str) -> str:
    ipaddress.ip_network(text)  # its ValueError names what is wrong
    return text


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class FetchSettings:
    """How to ask for pictures. None of it bears identity: it decides when a picture comes, not what it is."""

    deadline_s: Annotated[float, Field(gt=0)] = 20.0
    """Seconds for one row, all in: name, connection, redirects, answer, waits and retries."""
    connect_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds to open a connection, within the deadline."""
    connections_per_host: Annotated[int, Field(ge=1)] = 4
    """Requests to one host at the same time, in one worker: N workers may make N times as many."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a transient failure is tried again within the deadline."""
    backoff_s: Annotated[float, Field(ge=0)] = 0.5
    """Seconds before the first retry, doubled for each further one; a longer Retry-After wins."""
    max_bytes: Annotated[int, Field(ge=1)] = 32 << 20
    """Bytes of one picture, after any gzip."""
    bytes_in_flight: Annotated[int, Field(ge=1)] = 256 << 20
    """Bytes of fetched pictures that may wait in one worker for their decoding."""
    threads: Annotated[int, Field(ge=1)] = 64
    """Threads that fetch in one worker; 64 to 128 keep a core busy."""
    max_redirects: Annotated[int, Field(ge=0)] = 5
    """Redirects that are followed; each target is checked like the first URL."""
    allow_private: tuple[Annotated[str, AfterValidator(_network)], ...] = ()
    """Networks that may be asked though they are not public, such as "127.0.0.0/8" for tests and the demo."""
    contact: Annotated[str, Field(pattern=r"^[ -~]*$")] = ""
    """Where a webmaster reaches you (URL or mail); stands in the User-Agent of every request."""


READ_SIZE = 65536
INFLATED_SIZE = 1 << 20


class Fetched:
    """The body of an answer. Its bytes count against `bytes_in_flight` until `release()`."""

    def __init__(
        self, data: bytes, final_url: str, http_status: int, content_type: str, release: Callable[[], None]
    ) -> None:
        self.data = data
        self.final_url = final_url
        self.http_status = http_status
        self.content_type = content_type
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Gives the bytes back to the budget; a second call does nothing.

        Release in order of completion: a consumer that waits for row 5 while it holds the bytes of rows 6 to 100
        starves row 5 into `timeout`.
        """
        release, self._release = self._release, None
        if release is not None:
            release()


class Fetcher:
    """Fetches URLs, from any number of threads. A context manager: at its end open requests end as `timeout`.

    `ssl_context` replaces the system's trusted authorities, `resolver` the system's resolver.
    """

    def __init__(
        self, settings: FetchSettings, *, ssl_context: ssl.SSLContext | None = None, resolver: Resolver | None = None
    ) -> None:
        self.settings = settings
        contact = f" (+{settings.contact})" if settings.contact else ""
        self._headers = {
            "User-Agent": f"armchair/0.1{contact}",
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        self._ssl_context = ssl_context or _shared_ssl_context()
        self._allowed = [ipaddress.ip_network(network) for network in settings.allow_private]
        self._closing = threading.Event()
        self._reaper = _Reaper()
        self._names = Names(resolver or system_resolver, settings.threads)
        self._budget = _Budget(settings.bytes_in_flight, settings.max_bytes, self._closing)
        # First pieces of all threads take half the budget; the other half lets bodies grow.
        self._piece = min(settings.max_bytes, max(1 << 20, settings.bytes_in_flight // (2 * settings.threads)))
        self._hosts = _Hosts(settings.connections_per_host)

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Shuts what is open; requests that are under way return `timeout`."""
        self._closing.set()
        self._names.close()
        self._reaper.close()

    def fetch(self, url: str, *, not_after: float = math.inf) -> Fetched | Rejected:
        """Asks for one URL: its body, or why there is none. What the web does raises nothing.

        The deadline does not run while the row waits for a free connection of its host or for room in the byte
        budget: these are our limits. `not_after` (time.monotonic() seconds) runs always; it is the shard's deadline.
        """
        target = normal_url(url)
        if isinstance(target, Rejected):
            return target
        clock = _Clock(self.settings.deadline_s, not_after)
        for attempt in range(self.settings.retries + 1):
            try:
                return self._follow(target, clock)
            except _No as no:
                wait_s = max(self.settings.backoff_s * 2**attempt, no.retry_after_s)
                again = no.again and attempt < self.settings.retries and wait_s < clock.remaining()
                if not again or self._closing.wait(wait_s):
                    return no.rejected
        raise AssertionError("unreachable: the last attempt returns")

    def _follow(self, target: Target, clock: _Clock) -> Fetched:
        """One attempt: the request and its redirects."""
        for hop in range(self.settings.max_redirects + 1):
            with self._host_slot(target.host, clock):
                answer = self._request(target, clock, redirected=hop > 0)
            if isinstance(answer, Fetched):
                return answer
            try:
                following = normal_url(urljoin(target.url, answer))
            except ValueError:  # "//[": urljoin parses too
                following = Rejected(Reason.URL_INVALID)
            if isinstance(following, Rejected):
                raise _No(Reason.REDIRECT_FORBIDDEN, "to what is no http or https URL")
            target = following
        raise _No(Reason.REDIRECT_LIMIT)

    @contextmanager
    def _host_slot(self, host: str, clock: _Clock) -> Iterator[None]:
        with clock.paused():
            slot = self._hosts.enter(host, clock.not_after, self._closing)
        if not slot:
            raise _No(Reason.TIMEOUT, "the shard's time was over")
        try:
            yield
        finally:
            self._hosts.leave(host)

    def _request(self, target: Target, clock: _Clock, *, redirected: bool) -> Fetched | str:
        """One GET: the body, or the Location of a redirect."""
        addresses = self._checked_addresses(target.host, clock, redirected=redirected)
        with self._reaper.watch(clock.at) as watch:
            connection = _connection(target, self._ssl_context)
            response: HTTPResponse | None = None
            step = "connect"
            try:
                connection.sock = self._connect(addresses, target, clock, watch)
                step = "head"
                connection.request("GET", target.path, headers=self._headers)
                response = connection.getresponse()
                location = self._judge_status(response)
                if location is not None:
                    return location
                step = "body"
                return self._read_body(response, target, clock, watch)
            except (OSError, HTTPException) as error:
                # After the reaper's shut, http.client sees an orderly end or any error: the flag alone is the truth.
                raise _no_for(error, step) if not watch.expired else _No(Reason.TIMEOUT, step) from error
            finally:
                watch.close()
                connection.close()
                if response is not None:  # it holds the socket open behind the connection's back
                    response.close()

    def _checked_addresses(self, host: str, clock: _Clock, *, redirected: bool) -> Sequence[str]:
        try:
            addresses = self._names.addresses(host, clock.remaining())
        except (TimeoutError, CancelledError) as error:
            raise _No(Reason.TIMEOUT, "name") from error
        except socket.gaierror as error:
            raise _No(Reason.DNS_NO_SUCH_HOST if says_no_such_host(error) else Reason.DNS_FAILURE) from error
        except (OSError, UnicodeError) as error:
            raise _No(Reason.DNS_FAILURE) from error
        if not addresses:
            raise _No(Reason.DNS_NO_SUCH_HOST)
        # One bad address spoils the name: who mixes public and private addresses wants us to take the private one.
        if not all(self._may_connect(address) for address in addresses):
            raise _No(Reason.REDIRECT_FORBIDDEN if redirected else Reason.ADDRESS_FORBIDDEN, "not a public address")
        return addresses

    def _may_connect(self, address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return is_public(address) or any(ip in network for network in self._allowed)

    def _connect(self, addresses: Sequence[str], target: Target, clock: _Clock, watch: _Watch) -> socket.socket:
        """A connection to one of the checked addresses; TLS is spoken with the name of the host."""
        until = min(clock.at, time.monotonic() + self.settings.connect_s)
        tries = addresses[:3]
        for i, address in enumerate(tries):
            share_s = (until - time.monotonic()) / (len(tries) - i)
            try:
                sock = socket.create_connection((address, target.port), timeout=max(0.001, share_s))
                break
            except OSError:
                if i == len(tries) - 1:
                    raise
        watch.attach(sock)
        # The second line behind the reaper.
        sock.settimeout(max(0.001, clock.remaining()) + 1)
        if target.scheme == "https":
            secure = self._ssl_context.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
            watch.attach(secure)
            secure.do_handshake()
            return secure
        return sock

    def _judge_status(self, response: HTTPResponse) -> str | None:
        """None for an answer with a picture's body, the Location of a redirect, or _No."""
        status = response.status
        location = response.getheader("Location")
        if status in (301, 302, 303, 307, 308) and location:
            # http.client decodes headers as Latin-1; servers write UTF-8.
            return location.encode("latin-1").decode("utf-8", "replace")
        if 200 <= status < 300:
            if response.getheader("Content-Type", "").lower().startswith(("video/", "audio/")):
                raise _No(Reason.CONTENT_TYPE, "video or audio", status)
            return None
        reason = {408: Reason.HTTP_408, 425: Reason.HTTP_425, 429: Reason.HTTP_429}.get(status)
        if reason is None:
            reason = {4: Reason.HTTP_4XX, 5: Reason.HTTP_5XX}.get(status // 100, Reason.HTTP_STATUS)
        raise _No(reason, "", status, retry_after_s=_seconds(response.getheader("Retry-After")))

    def _read_body(self, response: HTTPResponse, target: Target, clock: _Clock, watch: _Watch) -> Fetched:
        status, limit = response.status, self.settings.max_bytes
        encoding = response.getheader("Content-Encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise _No(Reason.CONTENT_TYPE, "a content encoding that nobody asked for", status)
        inflater = zlib.decompressobj(wbits=47) if encoding not in ("", "identity") else None  # 47: gzip or zlib
        declared = response.length  # None: chunked, or until the connection ends
        if declared is not None and declared > limit:
            raise _No(Reason.TOO_LARGE, "declared", status)
        whole = declared if inflater is None else None
        room, kept = _Room(), 0
        try:
            self._take_room(room, self._piece if whole is None else whole, clock, watch, is_whole=whole is not None)
            if whole is not None:  # one allocation and no copy
                body: bytes | bytearray = response.read(whole)
                wire = len(body)
            else:
                body, wire = self._read_growing(response, inflater, room, clock, watch)
            if watch.expired:
                raise _No(Reason.TIMEOUT, "body", status)
            if (declared is not None and wire < declared) or (inflater is not None and wire and not inflater.eof):
                raise _No(Reason.TRUNCATED, "", status)
            if not body:
                # Without a length or chunks, the end of the connection is all there is: no proof that nothing was cut.
                proven = declared is not None or response.chunked or wire
                raise _No(Reason.EMPTY if proven else Reason.TRUNCATED, "", status)
            kept = len(body)
        except zlib.error as error:
            raise _No(Reason.DECODE, "gzip", status) from error
        finally:
            self._budget.keep(room, kept)
        content_type = response.getheader("Content-Type", "").partition(";")[0].strip().lower()[:100]
        return Fetched(bytes(body), target.url, status, content_type, lambda: self._budget.keep(room, 0))

    def _read_growing(
        self, response: HTTPResponse, inflater: zlib._Decompress | None, room: _Room, clock: _Clock, watch: _Watch
    ) -> tuple[bytearray, int]:
        """A body of unknown length, and the bytes that came over the wire for it."""
        # One growing buffer: a list of chunks leaves 64 threads' worth of freed pieces in the allocator.
        body, wire, limit = bytearray(), 0, self.settings.max_bytes
        while chunk := response.read1(READ_SIZE):
            wire += len(chunk)
            for piece in [chunk] if inflater is None else _inflated(inflater, chunk):
                if len(body) + len(piece) > limit:
                    raise _No(Reason.TOO_LARGE, "", response.status)
                while len(body) + len(piece) > room.held:
                    self._take_room(room, min(self._piece, limit - room.held), clock, watch, is_whole=False)
                body += piece
        return body, wire

    def _take_room(self, room: _Room, n: int, clock: _Clock, watch: _Watch, *, is_whole: bool) -> None:
        if watch.expired:
            raise _No(Reason.TIMEOUT, "body")
        with watch.paused(clock):
            if not self._budget.take(room, n, clock.not_after, is_whole=is_whole):
                raise _No(Reason.TIMEOUT, "no room in the byte budget")


def _inflated(inflater: zlib._Decompress, chunk: bytes) -> Iterator[bytes]:
    """What a chunk becomes, a megabyte at most at a time; what follows the end of the stream is dropped."""
    piece = b""
    while not inflater.eof and (chunk or len(piece) == INFLATED_SIZE):
        piece = inflater.decompress(chunk, INFLATED_SIZE)
        chunk = inflater.unconsumed_tail
        yield piece


class _No(Exception):
    """Ends one attempt: the reason, whether another attempt may help, and how long the server wants us to wait."""

    def __init__(
        self,
        reason: Reason,
        detail: str = "",
        status: int | None = None,
        *,
        again: bool = True,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(reason)
        self.rejected = Rejected(reason, detail, status)
        self.again = again and is_transient(reason)
        self.retry_after_s = retry_after_s


def _no_for(error: Exception, step: str) -> _No:
    """The reason for an error of socket, ssl or http.client."""
    match error:
        case ssl.SSLCertVerificationError():
            return _No(Reason.TLS, "certificate", again=False)
        case ssl.SSLError():
            return _No(Reason.TLS)
        case TimeoutError() if step != "connect":
            return _No(Reason.TIMEOUT, step)
        case IncompleteRead():
            return _No(Reason.TRUNCATED, step)
        case OSError():  # RemoteDisconnected too, which is also an HTTPException
            return _No(Reason.TRUNCATED) if step == "body" else _No(Reason.CONNECT)
        case _:
            return _No(Reason.HTTP_STATUS, "not an answer in HTTP")


class _Lines(io.BufferedReader):
    """Remembers the last line that was not nothing: http.client takes the end of the connection for an empty line."""

    last = b""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self.last = line or self.last
        return line


class _Response(HTTPResponse):
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


def _connection(target: Target, context: ssl.SSLContext) -> HTTPConnection:
    """A connection without a socket: it knows the Host header and must not dial by itself."""
    if target.scheme == "https":
        connection: HTTPConnection = HTTPSConnection(target.host, target.port, context=context)
    else:
        connection = HTTPConnection(target.host, target.port)
    connection.auto_open = 0
    connection.response_class = _Response
    return connection


def _seconds(retry_after: str | None) -> float:
    """Retry-After as seconds from now: a number or a date; 0 without one."""
    if not retry_after:
        return 0.0
    with suppress(ValueError):
        return max(0.0, float(retry_after))
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


_ssl_context: ssl.SSLContext | None = None
_ssl_lock = threading.Lock()


def _shared_ssl_context() -> ssl.SSLContext:
    """One context a process: building one costs 30 ms of CPU, more than all else that is done for a picture."""
    global _ssl_context
    with _ssl_lock:
        if _ssl_context is None:
            _ssl_context = ssl.create_default_context()
        return _ssl_context


# --- clocks ----------------------------------------------------------------------------------------------------------
class _Clock:
    """The time of one row, in time.monotonic() seconds. `paused()` stops it while the row waits for us."""

    def __init__(self, seconds: float, not_after: float) -> None:
        self._at = time.monotonic() + seconds
        self.not_after = not_after

    @property
    def at(self) -> float:
        return min(self._at, self.not_after)

    def remaining(self) -> float:
        return self.at - time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._at += time.monotonic() - start


class _Watch:
    """What the reaper knows of one request: when it is over, and the socket to shut then."""

    def __init__(self, reaper: _Reaper, at: float) -> None:
        self.at = at
        self.expired = False
        self._reaper = reaper
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def attach(self, sock: socket.socket) -> None:
        """Puts a socket under the reaper's eye; TimeoutError if time was over meanwhile."""
        with self._lock:
            self._socket = sock
            if self.expired:
                raise TimeoutError

    def close(self) -> None:
        """Closes the socket; in the next moment its number may be another connection's."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def expire(self) -> None:
        with self._lock:
            self.expired = True
            if self._socket is not None:
                with suppress(OSError):  # closed by the peer in the same moment
                    # Not SSLSocket.shutdown, which takes the TLS state away under the reading thread.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    @contextmanager
    def paused(self, clock: _Clock) -> Iterator[None]:
        self._reaper.move(self, clock.not_after)
        try:
            with clock.paused():
                yield
        finally:
            self._reaper.move(self, clock.at)


class _Reaper:
    """One thread that shuts the sockets whose time is over: the only cure for headers that drip."""

    def __init__(self) -> None:
        self._watches: set[_Watch] = set()
        self._changed = threading.Condition()
        self._next = math.inf
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fetch-reaper", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, at: float) -> Iterator[_Watch]:
        watch = _Watch(self, at)
        with self._changed:
            if self._closed:
                watch.expire()
            self._watches.add(watch)
            self._wake_for(at)
        try:
            yield watch
        finally:
            with self._changed:
                self._watches.discard(watch)

    def move(self, watch: _Watch, at: float) -> None:
        with self._changed:
            watch.at = at
            self._wake_for(at)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for watch in self._watches:
                watch.expire()
            self._changed.notify()
        self._thread.join()

    def _wake_for(self, at: float) -> None:
        if at < self._next:
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                for watch in self._watches:
                    if watch.at <= now and not watch.expired:
                        watch.expire()
                self._next = min((watch.at for watch in self._watches if not watch.expired), default=math.inf)
                self._changed.wait(None if self._next == math.inf else max(0.0, self._next - now))


# --- limits ----------------------------------------------------------------------------------------------------------
class _Room:
    """What one body holds of the budget."""

    held = 0


class _Budget:
    """Bytes that may be in memory at once.

    A body of known length reserves it whole, before the first byte. One of unknown length grows, and two half-read
    bodies that wait for each other's room would wait for ever. So growing leaves `largest` bytes free, the most that
    one body may need, and one body at a time, the elder, may take of these: it always comes to its end.
    """

    def __init__(self, total: int, largest: int, closing: threading.Event) -> None:
        self._total = total
        self._largest = largest
        self._free = total
        self._elder: _Room | None = None
        self._closing = closing
        self._changed = threading.Condition()

    def take(self, room: _Room, n: int, not_after: float, *, is_whole: bool) -> bool:
        """Waits for `n` more bytes; a body larger than the whole budget gets it when it is alone."""
        with self._changed:
            while not self._fits(room, n, is_whole):
                left_s = not_after - time.monotonic()
                if left_s <= 0 or self._closing.is_set():
                    return False
                self._changed.wait(min(0.5, left_s))
            self._free -= n
            room.held += n
            return True

    def keep(self, room: _Room, n: int) -> None:
        """Gives back all but `n` bytes; the body grows no more."""
        with self._changed:
            self._free += room.held - n
            room.held = n
            if self._elder is room:
                self._elder = None
            self._changed.notify_all()

    def _fits(self, room: _Room, n: int, is_whole: bool) -> bool:
        if not is_whole and self._free >= n + self._largest:
            return True
        if self._free < min(n, self._total - room.held):
            return False
        if not is_whole:
            if self._elder not in (None, room):
                return False
            self._elder = room
        return True


class _Hosts:
    """At most N requests to a host at the same time; a host that nobody asks for takes no memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._slots: dict[str, tuple[threading.Semaphore, int]] = {}

    def enter(self, host: str, not_after: float, closing: threading.Event) -> bool:
        with self._lock:
            semaphore, users = self._slots.get(host, (None, 0))
            semaphore = semaphore or threading.Semaphore(self._limit)
            self._slots[host] = (semaphore, users + 1)
        while not closing.is_set() and (left := not_after - time.monotonic()) > 0:
            if semaphore.acquire(timeout=min(0.5, left)):
                return True
        self._forget(host)
        return False

    def leave(self, host: str) -> None:
        self._slots[host][0].release()
        self._forget(host)

    def _forget(self, host: str) -> None:
        with self._lock:
            semaphore, users = self._slots[host]
            if users == 1:
                del self._slots[host]
            else:
                self._slots[host] = (semaphore, users - 1)
