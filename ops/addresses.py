"""Which address a URL means: its form on the wire, whether an address is public, and a cache of names.

Nothing is connected to here; ops/fetch.py asks, checks and connects.
"""

from __future__ import annotations

import ipaddress
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from ops.reasons import Reason, Rejected

Resolver = Callable[[str], Sequence[str]]
"""Name -> addresses as text; raises socket.gaierror."""

NAME_TTL_S = 300.0
"""How long an answer of the resolver is believed, also that a name does not exist (getaddrinfo hides the real TTL)."""


@dataclass(frozen=True)
class Target:
    """A URL in the form that goes on the wire: all ASCII, host lower-cased, no fragment, `path` with its query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        """The URL again; a default port is left out."""
        return self.site + self.path

    @property
    def site(self) -> str:
        """Scheme, host and port: what one robots.txt speaks for."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"


_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def normal_url(url: str) -> Target | Rejected:
    """What a browser would ask for: spaces stripped, non-ASCII percent-encoded, IDNA host, no fragment.

    >>> normal_url(" HTTP://Bücher.example:80/ä b.jpg?q=é#top ").url
    'http://xn--bcher-kva.example/%C3%A4%20b.jpg?q=%C3%A9'
    >>> normal_url("file:///etc/passwd").reason
    <Reason.URL_SCHEME: 'url_scheme'>
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
        scheme = parts.scheme.lower()
        if scheme and scheme not in _PORTS:
            return Rejected(Reason.URL_SCHEME, "neither http nor https")
        if not scheme or not host or port == 0:
            return Rejected(Reason.URL_INVALID, "no scheme or no host")
        if len(url) > 8000:
            return Rejected(Reason.URL_INVALID, "longer than servers read")
        if "@" in parts.netloc:
            return Rejected(Reason.URL_INVALID, "a user name in the URL")
        if ":" in host:
            host = str(ipaddress.IPv6Address(host))
        else:
            host = host.encode("idna").decode("ascii").lower().rstrip(".")
            if not _HOST.fullmatch(host):
                return Rejected(Reason.URL_INVALID, "a host that no name can have")
        path = quote(parts.path or "/", safe="%/:=&?~#+!$,;'@()*[]|")
        if parts.query:
            path += "?" + quote(parts.query, safe="%/:=&?~#+!$,;'@()*[]|")
    except ValueError:  # urlsplit, port, IPv6Address, and UnicodeError of idna and quote
        return Rejected(Reason.URL_INVALID, "not a URL")
    return Target(scheme, host, port or _PORTS[scheme], path)


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_REFUSED = [
    ipaddress.ip_network(network)
    for network in (
        "192.88.99.0/24",  # 6to4 relays
        "192.0.0.0/24",  # IETF protocols; 192.0.0.192 is Oracle's metadata server
        "168.63.129.16/32",  # Azure's host, a public number that means another machine in each network
        "3fff::/20",  # documentation; newer than Python 3.11's tables, like the next
        "5f00::/16",  # segment routing
    )
]
"""Networks that `ipaddress.is_global` takes for public."""


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, looking through v6 forms that carry a v4 address.

    `ipaddress.is_global` alone says True for multicast, and for 127.0.0.1 in NAT64 and 6to4 clothes.

    >>> [is_public(a) for a in ("93.184.216.34", "10.0.0.1", "224.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::")]
    [True, False, False, False, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            carried.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        inner = [v4 for v4 in carried if v4 is not None]
        if inner:
            return all(is_public(str(v4)) for v4 in inner)
        if ip.is_site_local:
            return False
    if any(ip in network for network in _REFUSED):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Name:
    def __init__(self) -> None:
        self.future: Future[Sequence[str]]
        self.expires = math.inf


class Names:
    """A cache over the resolver: many threads that want one name ask once. Its own pool, since getaddrinfo
    can't be interrupted; DNS is the first limit of large runs.

    `threads` as many as ask: a question that waits for a thread would do so on its row's deadline.
    """

    def __init__(self, resolver: Resolver, threads: int) -> None:
        self._resolver = resolver
        self._lock = threading.Lock()
        self._names: dict[str, _Name] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch-names")
        self._closed = False

    def addresses(self, host: str, timeout_s: float) -> Sequence[str]:
        """Raises socket.gaierror, TimeoutError (of this wait: the question goes on), CancelledError after close()."""
        with suppress(ValueError):
            return [str(ipaddress.ip_address(host))]
        with self._lock:
            if self._closed:
                raise CancelledError
            name = self._names.get(host)
            if name is None or name.expires <= time.monotonic():
                name = self._names[host] = _Name()
                name.future = self._pool.submit(self._resolver, host)
                name.future.add_done_callback(lambda future: self._keep(host, name, future))
        return name.future.result(max(0.0, timeout_s))

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _keep(self, host: str, name: _Name, future: Future[Sequence[str]]) -> None:
        error = None if future.cancelled() else future.exception()
        believed = error is None or says_no_such_host(error)
        name.expires = time.monotonic() + (NAME_TTL_S if believed else 0.0)


def says_no_such_host(error: BaseException) -> bool:
    """A name without addresses, told apart from a resolver that fails."""
    no_name = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
    return isinstance(error, socket.gaierror) and error.errno in no_name


def system_resolver(host: str) -> Sequence[str]:
    """The operating system's: files, then DNS. Writes like 2130706433 and 0x7f.1 come out as the address they mean."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
