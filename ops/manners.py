"""Manners toward those we ask: how often a host is asked, when it wants to be left alone, and who has said no.

    Turns      rows wait here, by host. A thread gets the next row whose host may be asked now, so no thread ever
               waits for a host: one that is slow, busy or dead leaves the others their threads.
    opts_out   what the head of an answer says about uses like ours.

All of it counts per worker: N workers may ask a host N times as often. Paths that robots.txt closes: ops/robots.py.
"""

from __future__ import annotations

import heapq
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from ops.reasons import Rejected

Work = TypeVar("Work")


@dataclass
class _Host(Generic[Work]):
    waiting: deque[Work] = field(default_factory=deque)
    asked: int = 0
    """Requests under way."""
    failures: int = 0
    """Since the last answer."""
    held_until: float = 0.0
    """time.monotonic() before which it is not asked."""
    refusal: Rejected | None = None
    """What rows get until then instead of waiting."""
    is_listed: bool = False


class Turns(Generic[Work]):
    """Work that waits for its host, and what is known of the hosts. Times are time.monotonic() seconds.

    A host is *held* for a time that it asked for (Retry-After): its rows wait, at most `longest_hold_s`. It is *closed*
    when it asked for more, or after `dead_after` requests in a row that failed without an answer: its rows get a
    refusal at once. After `cool_down_s` the next row is the probe: one failure more closes the host again.
    """

    def __init__(self, per_host: int, longest_hold_s: float, dead_after: int, cool_down_s: float) -> None:
        self._per_host = per_host
        self._longest_hold_s = longest_hold_s
        self._dead_after = dead_after
        self._cool_down_s = cool_down_s
        self._hosts: dict[str, _Host[Work]] = {}
        self._ready: deque[str] = deque()
        """Names of hosts that may be asked, each once (`is_listed`); they take turns."""
        self._later: list[tuple[float, int, str, list[Work]]] = []
        """A heap of what happens at a time: a row comes back, or (no row) a host is free again."""
        self._number = 0
        self._changed = threading.Condition()
        self._has_timekeeper = False
        self._closed = False

    def put(self, host: str, work: Work, *, not_before: float = 0.0, first: bool = False) -> None:
        """Lets work wait for its turn; `first` before the host's other rows."""
        with self._changed:
            if not_before > time.monotonic() and not self._closed:
                self._at(not_before, host, [work])
                return
            waiting = self._host(host).waiting
            waiting.appendleft(work) if first else waiting.append(work)
            self._list(host)

    def take(self) -> tuple[str, Work] | None:
        """Waits for work whose turn it is. After `close()` all that waits, at once; then None.

        Whoever takes must `leave()` the host.
        """
        with self._changed:
            while True:
                self._clock_strikes()
                while self._ready:
                    name = self._ready.popleft()
                    host = self._hosts[name]
                    host.is_listed = False
                    if not self._may_be_asked(host):
                        self._forget(name)
                        continue
                    host.asked += 1
                    work = host.waiting.popleft()
                    self._list(name)
                    if self._later and not self._has_timekeeper:
                        self._changed.notify()
                    return name, work
                if self._closed:
                    return None
                # One thread alone looks at the clock: with 64 of them each tick would wake all.
                if self._has_timekeeper or not self._later:
                    self._changed.wait()
                    continue
                self._has_timekeeper = True
                self._changed.wait(max(0.0, self._later[0][0] - time.monotonic()))
                self._has_timekeeper = False

    def leave(self, host: str) -> None:
        """Ends a turn."""
        with self._changed:
            self._hosts[host].asked -= 1
            self._list(host)
            self._forget(host)

    def close(self) -> None:
        """Nothing waits any more."""
        with self._changed:
            self._closed = True
            for _, _, host, works in self._later:
                self._host(host).waiting.extend(works)
            self._later.clear()
            for host in self._hosts:
                self._list(host)
            self._changed.notify_all()

    # --- what hosts told us ------------------------------------------------------------------------------------------
    def refusal(self, host: str) -> Rejected | None:
        """Why this host is not asked at present."""
        with self._changed:
            known = self._hosts.get(host)
            return None if known is None or known.held_until <= time.monotonic() else known.refusal

    def answered(self, host: str) -> None:
        """It lives: whatever it said, it was an answer."""
        with self._changed:
            self._hosts[host].failures = 0

    def failed(self, host: str, why: Rejected, asks_to_wait_s: float = 0.0) -> None:
        """It gave no answer, or asked to be left alone for a time."""
        with self._changed:
            known = self._hosts[host]
            known.failures += 1
            if asks_to_wait_s > self._longest_hold_s:
                self._close(host, why, "its host asked to be left alone for longer", asks_to_wait_s)
            elif 0 < self._dead_after <= known.failures:
                self._close(host, why, "its host gave no answer many times", max(self._cool_down_s, asks_to_wait_s))
            elif asks_to_wait_s and (until := time.monotonic() + asks_to_wait_s) > known.held_until:
                known.held_until = until
                self._at(until, host, [])

    def _close(self, host: str, why: Rejected, detail: str, seconds: float) -> None:
        known = self._hosts[host]
        until = time.monotonic() + seconds
        if known.refusal is None or until > known.held_until:
            known.held_until, known.refusal = until, replace(why, detail=detail, http_status=None)
            self._at(until, host, [])
        self._list(host)  # its rows need not wait for that

    # --- under the lock ----------------------------------------------------------------------------------------------
    def _host(self, name: str) -> _Host[Work]:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = _Host()
        return host

    def _may_be_asked(self, host: _Host[Work]) -> bool:
        is_probe = 0 < self._dead_after <= host.failures
        if not host.waiting or (host.refusal is None and host.asked >= (1 if is_probe else self._per_host)):
            return False
        return self._closed or host.refusal is not None or host.held_until <= time.monotonic()

    def _list(self, name: str) -> None:
        host = self._hosts[name]
        if not host.is_listed and self._may_be_asked(host):
            host.is_listed = True
            self._ready.append(name)
            self._changed.notify()

    def _at(self, when: float, host: str, works: list[Work]) -> None:
        self._number += 1
        heapq.heappush(self._later, (when, self._number, host, works))
        if self._later[0][1] == self._number:
            self._changed.notify_all() if self._has_timekeeper else self._changed.notify()

    def _clock_strikes(self) -> None:
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            _, _, name, works = heapq.heappop(self._later)
            host = self._host(name)
            host.waiting.extendleft(works)
            if host.held_until <= now:
                host.refusal = None
            self._list(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        """A host that nobody asks for and that we know nothing of takes no memory."""
        host = self._hosts[name]
        if not (host.waiting or host.asked or host.failures or host.is_listed) and host.held_until <= time.monotonic():
            del self._hosts[name]


# --- opting out ------------------------------------------------------------------------------------------------------
_NO = frozenset(("noai", "noimageai", "noml", "noindex", "noimageindex", "none"))
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_NAMED = re.compile(r"\s*([A-Za-z*][^\s:]*)\s*:(.*)", re.DOTALL)


def opts_out(x_robots_tags: Sequence[str], tdm_reservations: Sequence[str], product_token: str) -> bool:
    """Whether header lines of an answer reserve the picture against uses like ours.

    A directive may be meant for one agent (`googlebot: noindex`): the name holds up to the next name or the end of the
    line. A date has commas and colons of its own.

    >>> opts_out(["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], [], "armchair")
    True
    >>> opts_out(["googlebot: noindex, nofollow", "max-image-preview: none"], ["0"], "armchair")
    False
    """
    return any(value.strip() == "1" for line in tdm_reservations for value in line.split(",")) or any(
        _says_no(line, product_token) for line in x_robots_tags
    )


def _says_no(line: str, product_token: str) -> bool:
    is_for_us = True
    for piece in re.split("[,;]", line.lower()):
        while (named := _NAMED.fullmatch(piece)) and named[1] not in _WITH_VALUE:
            is_for_us, piece = named[1] in ("*", product_token), named[2]
        if named is None and is_for_us and not _NO.isdisjoint(piece.split()):
            return True
    return False
