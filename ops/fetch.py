"""From a URL to bytes: requests, redirects, retries. Threads, http.client, one SSLContext.

Lives here: what one request is, and what follows it. Not here: what a URL or an address means (ops/addresses.py), how
long and how much (ops/limits.py), how often a host is asked (ops/manners.py), what robots.txt says (ops/robots.py),
what the bytes are (ops/pictures.py), whether we want them (ops/filters.py), which rows to ask for (ops/ingest.py).

What the web may try, and what stops it:

    an address inside our network, also        every address of a name is checked, at every redirect, and the
    by a redirect or a second DNS answer       connection goes to a checked address, never to the name again
    a byte of the headers now and then         a per-operation timeout never fires: the reaper shuts the socket
    a body without end, a gzip bomb            `max_bytes`, counted on what comes out of the inflater
    many large bodies at once                  `bytes_in_flight`, reserved before the bytes are kept
    a Content-Length that lies, a head that    `truncated`
    the end of the connection cuts
    a host that is busy, slow or dead          its rows wait apart, and threads for nobody (ops/manners.py)

Proxies of the environment (http_proxy) are not used: a proxy resolves names itself, past the address check.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from http.client import HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path
from types import TracebackType
from typing import Annotated, TypeVar
from urllib.parse import urljoin

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from ops.addresses import Names, Resolver, Target, is_public, normal_url, says_no_such_host, system_resolver
from ops.limits import Budget, Clock, Reaper, Room, Watch
from ops.manners import Turns, opts_out
from ops.reasons import Reason, Rejected, is_transient
from ops.robots import MAX_BYTES, PRODUCT_TOKEN, NodeCache, Sites
from ops.wire import connection_to, retry_after_s, shared_ssl_context


def _network(text: str) -> str:
    ipaddress.ip_network(text)  # its ValueError names what is wrong
    return text


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class FetchSettings:
    """How to ask for pictures. None of it bears identity: it decides if and when a picture comes, not what it is."""

    deadline_s: Annotated[float, Field(gt=0)] = 20.0
    """Seconds for one row, all in: name, connection, redirects, answer, waits and retries."""
    connect_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds to open a connection, within the deadline."""
    connections_per_host: Annotated[int, Field(ge=1)] = 4
    """Requests to one host at the same time, in one worker: N workers may make N times as many."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a transient failure is tried again within the deadline."""
    backoff_s: Annotated[float, Field(ge=0)] = 0.5
    """Seconds before the first retry, doubled for each further one; a longer Retry-After wins, and holds all rows of
    its host. One that is longer than `deadline_s` ends them."""
    dead_after: Annotated[int, Field(ge=0)] = 12
    """Requests without an answer in a row (no connection, silence, or asked to wait) after which a host counts as dead:
    its further rows end at once, under the same transient reason. 0: never."""
    dead_host_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds until a dead host gets one request to show that it lives, and until a robots.txt that did not come is
    asked for again."""
    robots: bool = True
    """Whether robots.txt is asked for (once a site and hour on each node) and obeyed, as "armchair". One that does not
    come makes the rows of its site transient; none there (4xx) allows all."""
    opt_out: bool = True
    """Whether X-Robots-Tag (noai, noimageai, noml, noindex, noimageindex, none) and TDM-Reservation are obeyed."""
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


_SILENCE = (Reason.CONNECT, Reason.TIMEOUT, Reason.DNS_FAILURE)
"""What a dead host answers."""

Answer = Fetched | Rejected
Result = TypeVar("Result")


class _Row:
    """One row on its way: where it is, and what is still to do. It belongs to one thread at a time."""

    def __init__(
        self, target: Target, clock: Clock, end: Callable[[Answer | Exception], None], *, robots: bool
    ) -> None:
        self.first = self.target = target
        self.clock = clock
        self.end = end
        self.is_robots = robots
        self.hops = 0
        self.tries = 0
        self.said: Rejected | None = None
        """Why the try before failed."""

    def again(self) -> None:
        """Back to the URL of the list."""
        self.target, self.hops, self.tries = self.first, 0, self.tries + 1


class Fetcher:
    """Fetches URLs with threads of its own. A context manager: at its end open requests end as `timeout`.

    A row is several requests: redirects, retries, and robots.txt before the first one of a site. Between two of them it
    waits in `Turns` and holds no thread. `ssl_context` replaces the system's trusted authorities, `resolver` the
    system's resolver, `robots_cache` the folder where the workers of a node share what robots.txt files said.
    """

    def __init__(
        self,
        settings: FetchSettings,
        *,
        ssl_context: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
        robots_cache: Path | None = None,
    ) -> None:
        self.settings = settings
        contact = f" (+{settings.contact})" if settings.contact else ""
        self._headers = {
            "User-Agent": f"{PRODUCT_TOKEN}/0.1{contact}",
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        self._ssl_context = ssl_context or shared_ssl_context()
        self._allowed = [ipaddress.ip_network(network) for network in settings.allow_private]
        self._closing = threading.Event()
        self._reaper = Reaper()
        self._names = Names(resolver or system_resolver, settings.threads)
        self._budget = Budget(settings.bytes_in_flight, settings.max_bytes, self._closing)
        # First pieces of all threads take half the budget; the other half lets bodies grow.
        self._piece = min(settings.max_bytes, max(1 << 20, settings.bytes_in_flight // (2 * settings.threads)))
        self._turns = Turns[_Row](
            settings.connections_per_host, settings.deadline_s, settings.dead_after, settings.dead_host_s
        )
        self._sites = Sites[_Row](NodeCache(robots_cache), settings.dead_host_s)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Shuts what is open; rows that are under way end as `timeout`."""
        self._closing.set()
        self._names.close()
        self._reaper.close()
        self._turns.close()
        for thread in self._threads:
            thread.join()
        self._sites.close()

    def fetch(self, url: str, *, not_after: float = math.inf) -> Answer:
        """Asks for one URL and waits: its body, or why there is none. What the web does raises nothing."""

        def answered(answer: Answer | Exception) -> Answer:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return self.submit(url, answered, not_after=not_after).result()

    def submit(
        self, url: str, then: Callable[[Answer | Exception], Result], *, not_after: float = math.inf
    ) -> Future[Result]:
        """Asks for one URL; the future holds what `then` makes of the answer, in the thread that fetched it.

        The deadline does not run while the row waits for a turn at its host or for room in the byte budget: these are
        our limits. `not_after` (time.monotonic() seconds) runs always; it is the shard's deadline. An exception is a
        bug of ours, never the web's doing.
        """
        result: Future[Result] = Future()

        def end(answer: Answer | Exception) -> None:
            try:
                result.set_result(then(answer))
            except BaseException as error:
                result.set_exception(error)

        target = normal_url(url)
        if isinstance(target, Rejected):
            end(target)
            return result
        clock = Clock(self.settings.deadline_s, not_after)
        clock.stop()
        self._turns.put(target.host, _Row(target, clock, end, robots=False))
        if len(self._threads) < self.settings.threads:
            thread = threading.Thread(target=self._work, name="fetch", daemon=True)
            self._threads.append(thread)
            thread.start()
        return result

    def _work(self) -> None:
        while (turn := self._turns.take()) is not None:
            host, row = turn
            answer: Answer | Exception | None
            try:
                answer = self._step(row)
            except Exception as error:
                answer = error
            finally:
                self._turns.leave(host)
            if answer is not None:
                row.end(answer)

    def _step(self, row: _Row) -> Answer | None:
        """One request of a row; None: it waits for its next one."""
        row.clock.go_on()
        host = row.target.host
        if self._closing.is_set() or row.clock.not_after <= time.monotonic():
            return row.said or Rejected(Reason.TIMEOUT, "the shard's time was over")
        if refusal := self._turns.refusal(host):
            return refusal
        if self.settings.robots and not row.is_robots:
            row.clock.stop()
            rules = self._sites.rules(row.target.site, row, self._ask_for_robots)
            if rules is None or isinstance(rules, Rejected):
                return rules
            row.clock.go_on()
            if not rules.allow(row.target.path):
                return Rejected(Reason.ROBOTS)
        try:
            answer = self._request(row)
        except _No as no:
            self._learn(host, no)
            return self._perhaps_again(row, no)
        self._turns.answered(host)
        return answer if isinstance(answer, Fetched) else self._redirect(row, answer)

    def _learn(self, host: str, no: _No) -> None:
        """What a failed request says about its host."""
        if self._closing.is_set():
            return
        if no.retry_after_s or no.rejected.reason in _SILENCE:
            self._turns.failed(host, no.rejected, no.retry_after_s)
        elif no.rejected.http_status:
            self._turns.answered(host)

    def _perhaps_again(self, row: _Row, no: _No) -> Rejected | None:
        row.said = no.rejected
        wait_s = max(self.settings.backoff_s * 2**row.tries, no.retry_after_s)
        if not no.again or row.tries >= self.settings.retries or wait_s >= row.clock.remaining():
            return no.rejected
        row.again()
        at = time.monotonic() + wait_s
        row.clock.stop(at)
        self._turns.put(row.target.host, row, not_before=at)
        return None

    def _redirect(self, row: _Row, location: str) -> Rejected | None:
        if row.hops >= self.settings.max_redirects:
            return Rejected(Reason.REDIRECT_LIMIT)
        try:
            following = normal_url(urljoin(row.target.url, location))
        except ValueError:  # "//[": urljoin parses too
            following = Rejected(Reason.URL_INVALID)
        if isinstance(following, Rejected):
            return Rejected(Reason.REDIRECT_FORBIDDEN, "to what is no http or https URL")
        row.target, row.hops = following, row.hops + 1
        row.clock.stop()
        self._turns.put(following.host, row, first=True)
        return None

    def _ask_for_robots(self, row: _Row) -> None:
        """Lets a robots.txt take its turn at its host; `row` is the first that needs it."""
        site = row.target.site
        target = replace(row.target, path="/robots.txt")

        def end(answer: Answer | Exception) -> None:
            if isinstance(answer, Fetched):
                answer.release()
            for waiting in self._sites.learn(site, answer.data if isinstance(answer, Fetched) else answer):
                self._turns.put(waiting.target.host, waiting, first=True)

        clock = Clock(self.settings.deadline_s, row.clock.not_after)
        clock.stop()
        self._turns.put(target.host, _Row(target, clock, end, robots=True), first=True)

    def _request(self, row: _Row) -> Fetched | str:
        """One GET: the body, or the Location of a redirect."""
        target, clock = row.target, row.clock
        addresses = self._checked_addresses(target.host, clock, redirected=row.hops > 0)
        with self._reaper.watch(clock.at) as watch:
            connection = connection_to(target, self._ssl_context)
            response: HTTPResponse | None = None
            step = "connect"
            try:
                connection.sock = self._connect(addresses, target, clock, watch)
                step = "head"
                connection.request("GET", target.path, headers=self._headers)
                response = connection.getresponse()
                location = self._judge_head(response, row)
                if location is not None:
                    return location
                step = "body"
                return self._read_body(response, row, watch)
            except (OSError, HTTPException) as error:
                # After the reaper's shut, http.client sees an orderly end or any error: the flag alone is the truth.
                raise _no_for(error, step) if not watch.expired else _No(Reason.TIMEOUT, step) from error
            finally:
                watch.close()
                connection.close()
                if response is not None:  # it holds the socket open behind the connection's back
                    response.close()

    def _checked_addresses(self, host: str, clock: Clock, *, redirected: bool) -> Sequence[str]:
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

    def _connect(self, addresses: Sequence[str], target: Target, clock: Clock, watch: Watch) -> socket.socket:
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

    def _judge_head(self, response: HTTPResponse, row: _Row) -> str | None:
        """None for an answer with a body that we may take, the Location of a redirect, or _No."""
        status = response.status
        location = response.getheader("Location")
        if status in (301, 302, 303, 307, 308) and location:
            # http.client decodes headers as Latin-1; servers write UTF-8.
            return location.encode("latin-1").decode("utf-8", "replace")
        if 200 <= status < 300:
            if row.is_robots:
                return None
            tags, tdm = (response.msg.get_all(name, []) for name in ("X-Robots-Tag", "TDM-Reservation"))
            if self.settings.opt_out and (tags or tdm) and opts_out(tags, tdm, PRODUCT_TOKEN):
                raise _No(Reason.OPT_OUT, "", status)
            if response.getheader("Content-Type", "").lower().startswith(("video/", "audio/")):
                raise _No(Reason.CONTENT_TYPE, "video or audio", status)
            return None
        reason = {408: Reason.HTTP_408, 425: Reason.HTTP_425, 429: Reason.HTTP_429}.get(status)
        if reason is None:
            reason = {4: Reason.HTTP_4XX, 5: Reason.HTTP_5XX}.get(status // 100, Reason.HTTP_STATUS)
        raise _No(reason, "", status, retry_after_s=retry_after_s(response.getheader("Retry-After")))

    def _read_body(self, response: HTTPResponse, row: _Row, watch: Watch) -> Fetched:
        status, clock = response.status, row.clock
        limit = MAX_BYTES if row.is_robots else self.settings.max_bytes
        encoding = response.getheader("Content-Encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise _No(Reason.CONTENT_TYPE, "a content encoding that nobody asked for", status)
        inflater = zlib.decompressobj(wbits=47) if encoding not in ("", "identity") else None  # 47: gzip or zlib
        declared = response.length  # None: chunked, or until the connection ends
        if row.is_robots and declared is not None:
            declared = min(declared, limit)
        if declared is not None and declared > limit:
            raise _No(Reason.TOO_LARGE, "declared", status)
        whole = declared if inflater is None else None
        room, kept, is_cut = Room(), 0, False
        try:
            self._take_room(room, self._piece if whole is None else whole, clock, watch, is_whole=whole is not None)
            if whole is not None:  # one allocation and no copy
                body: bytes | bytearray = response.read(whole)
                wire = len(body)
            else:
                body, wire = self._read_growing(response, inflater, room, row, watch)
                is_cut = row.is_robots and len(body) == limit  # by us: the rest counts for nothing
            if watch.expired:
                raise _No(Reason.TIMEOUT, "body", status)
            if not is_cut and (
                (declared is not None and wire < declared) or (inflater is not None and wire and not inflater.eof)
            ):
                raise _No(Reason.TRUNCATED, "", status)
            if not body:
                # Without a length or chunks, the end of the connection is all there is: no proof that nothing was cut.
                proven = declared is not None or response.chunked or wire or row.is_robots
                raise _No(Reason.EMPTY if proven else Reason.TRUNCATED, "", status)
            kept = len(body)
        except zlib.error as error:
            raise _No(Reason.DECODE, "gzip", status) from error
        finally:
            self._budget.keep(room, kept)
        content_type = response.getheader("Content-Type", "").partition(";")[0].strip().lower()[:100]
        return Fetched(bytes(body), row.target.url, status, content_type, lambda: self._budget.keep(room, 0))

    def _read_growing(
        self, response: HTTPResponse, inflater: zlib._Decompress | None, room: Room, row: _Row, watch: Watch
    ) -> tuple[bytearray, int]:
        """A body of unknown length, and the bytes that came over the wire for it."""
        # One growing buffer: a list of chunks leaves 64 threads' worth of freed pieces in the allocator.
        body, wire = bytearray(), 0
        limit = MAX_BYTES if row.is_robots else self.settings.max_bytes
        while chunk := response.read1(READ_SIZE):
            wire += len(chunk)
            for piece in [chunk] if inflater is None else _inflated(inflater, chunk):
                if row.is_robots:
                    piece = piece[: limit - len(body)]
                if len(body) + len(piece) > limit:
                    raise _No(Reason.TOO_LARGE, "", response.status)
                while len(body) + len(piece) > room.held:
                    self._take_room(room, min(self._piece, limit - room.held), row.clock, watch, is_whole=False)
                body += piece
            if row.is_robots and len(body) == limit:
                break
        return body, wire

    def _take_room(self, room: Room, n: int, clock: Clock, watch: Watch, *, is_whole: bool) -> None:
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
