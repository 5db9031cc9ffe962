"""How long and how much: the clock of a row, the reaper that ends what is over its time, the budget of bytes.

Used by ops/fetch.py alone, which says what is asked; how often a host is asked stands in ops/manners.py.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


# --- clocks ----------------------------------------------------------------------------------------------------------
class Clock:
    """The time of one row, in time.monotonic() seconds. It stands still while the row waits for us."""

    def __init__(self, seconds: float, not_after: float) -> None:
        self._at = time.monotonic() + seconds
        self._stopped_at: float | None = None
        self.not_after = not_after

    @property
    def at(self) -> float:
        return min(self._at, self.not_after)

    def remaining(self) -> float:
        return self.at - time.monotonic()

    def stop(self, at: float = 0.0) -> None:
        """Stops it now, or at a time to come."""
        self._stopped_at = max(at, time.monotonic())

    def go_on(self) -> None:
        """Lets it run again."""
        if self._stopped_at is not None:
            self._at += max(0.0, time.monotonic() - self._stopped_at)
            self._stopped_at = None


class Watch:
    """What the reaper knows of one request: when it is over, and the socket to shut then."""

    def __init__(self, reaper: Reaper, at: float) -> None:
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
    def paused(self, clock: Clock) -> Iterator[None]:
        self._reaper.move(self, clock.not_after)
        try:
            clock.stop()
            yield
        finally:
            clock.go_on()
            self._reaper.move(self, clock.at)


class Reaper:
    """One thread that shuts the sockets whose time is over: the only cure for headers that drip."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._changed = threading.Condition()
        self._next = math.inf
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fetch-reaper", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, at: float) -> Iterator[Watch]:
        watch = Watch(self, at)
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

    def move(self, watch: Watch, at: float) -> None:
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
class Room:
    """What one body holds of the budget."""

    held = 0


class Budget:
    """Bytes that may be in memory at once.

    A body of known length reserves it whole, before the first byte. One of unknown length grows, and two half-read
    bodies that wait for each other's room would wait for ever. So growing leaves `largest` bytes free, the most that
    one body may need, and one body at a time, the elder, may take of these: it always comes to its end.
    """

    def __init__(self, total: int, largest: int, closing: threading.Event) -> None:
        self._total = total
        self._largest = largest
        self._free = total
        self._elder: Room | None = None
        self._closing = closing
        self._changed = threading.Condition()

    def take(self, room: Room, n: int, not_after: float, *, is_whole: bool) -> bool:
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

    def keep(self, room: Room, n: int) -> None:
        """Gives back all but `n` bytes; the body grows no more."""
        with self._changed:
            self._free += room.held - n
            room.held = n
            if self._elder is room:
                self._elder = None
            self._changed.notify_all()

    def _fits(self, room: Room, n: int, is_whole: bool) -> bool:
        if not is_whole and self._free >= n + self._largest:
            return True
        if self._free < min(n, self._total - room.held):
            return False
        if not is_whole:
            if self._elder not in (None, room):
                return False
            self._elder = room
        return True
