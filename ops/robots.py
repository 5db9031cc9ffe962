"""robots.txt after RFC 9309: which paths of a site a crawler with our product token may ask for, and a memory of that.

Not here: how a file is fetched (ops/fetch.py).
`Crawl-delay` and `Sitemap` are no part of the RFC and are not read.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ops.reasons import Reason, Rejected, is_transient

PRODUCT_TOKEN = "armchair"
MAX_BYTES = 500 << 10
"""What is read of a file; RFC 9309, section 2.5, wants at least 500 KiB."""
TTL_S = 3600.0
"""How long an answer is believed; the RFC allows a day."""


@dataclass(frozen=True)
class Rules:
    """The rules of one site that hold for us: (path pattern, whether it allows)."""

    rules: tuple[tuple[str, bool], ...] = ()

    def allow(self, path: str) -> bool:
        """Whether we may ask for this path with its query: the longest match decides, of two equal ones the kinder.

        >>> rules = parse(b"User-agent: *\\nDisallow: /a*.jpg$\\nAllow: /a/b")
        >>> [rules.allow(path) for path in ("/ab.jpg", "/ab.jpg?x", "/a/b.jpg")]
        [False, True, False]
        """
        path = _normal(path)
        found = max(((len(pattern), allows) for pattern, allows in self.rules if _matches(pattern, path)), default=None)
        return path == "/robots.txt" or found is None or found[1]


ALL_ALLOWED = Rules()


def parse(data: bytes) -> Rules:
    """The rules for `PRODUCT_TOKEN`, or those for `*` where no group names it. Lines that say nothing are skipped."""
    ours: list[tuple[str, bool]] = []
    everyones: list[tuple[str, bool]] = []
    is_named = False
    agents: list[str] = []
    in_rules = True
    for line in re.split(r"[\r\n]+", data[:MAX_BYTES].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")):
        key, colon, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key == "user-agent":
            if in_rules:  # the first agent of a new group
                agents, in_rules = [], False
            agent = re.match(r"[a-z_-]*", value.lower())
            agents.append("*" if value.startswith("*") else agent[0] if agent else "")
            is_named = is_named or agents[-1] == PRODUCT_TOKEN
        elif key in ("allow", "disallow"):
            in_rules = True
            if value:  # an empty Disallow forbids nothing
                rule = (_normal(value), key == "allow")
                if PRODUCT_TOKEN in agents:
                    ours.append(rule)
                if "*" in agents:
                    everyones.append(rule)
    return Rules(tuple(ours if is_named else everyones))


_UNRESERVED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")


def _normal(path: str) -> str:
    """One spelling for what means the same (RFC 9309, section 2.2.2): octets outside ASCII percent-encoded, those that
    need no encoding plain."""

    def respelled(match: re.Match[str]) -> str:
        char = chr(int(match[1], 16))
        return char if char in _UNRESERVED else match[0].upper()

    if not path.isascii():
        octets = path.encode("utf-8", "surrogateescape")
        path = "".join(chr(octet) if octet < 128 else f"%{octet:02X}" for octet in octets)
    return re.sub("%([0-9a-fA-F]{2})", respelled, path) if "%" in path else path


def _matches(pattern: str, path: str) -> bool:
    """By hand: a regex of many `*` takes exponential time on a path made for it."""
    to_the_end = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    if not others:
        return not to_the_end or path == first
    at = len(first)
    for piece in others[:-1]:
        at = path.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    if to_the_end:
        return path.endswith(others[-1]) and len(path) - len(others[-1]) >= at
    return path.find(others[-1], at) >= 0


# --- memory ----------------------------------------------------------------------------------------------------------
Waiting = TypeVar("Waiting")


class Sites(Generic[Waiting]):
    """The rules of every site that rows want to know, and the rows that wait for them: a site is asked once.

    A file that did not come (5xx, no connection, no end) closes its site for `cool_down_s`, under that reason.
    """

    def __init__(self, cache: NodeCache, cool_down_s: float) -> None:
        self._cache = cache
        self._cool_down_s = cool_down_s
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Rules | Rejected | Exception]] = {}
        self._waiting: dict[str, list[Waiting]] = {}

    def rules(self, site: str, row: Waiting, ask: Callable[[Waiting], None]) -> Rules | Rejected | None:
        """The rules, or why they can't be known. None: the row waits (and is another thread's from now on); the first
        one to wait has called `ask`. Raises what asking raised."""
        with self._lock:
            until, says = self._known.get(site, (0.0, None))
            if says is not None and time.monotonic() < until:
                if isinstance(says, Exception):
                    raise says
                return says
            if (rules := self._cache.get(site)) is not None:
                self._known[site] = (time.monotonic() + TTL_S, rules)
                return rules
            is_first = site not in self._waiting
            self._waiting.setdefault(site, []).append(row)
        if is_first:
            ask(row)
        return None

    def learn(self, site: str, answer: bytes | Rejected | Exception) -> list[Waiting]:
        """Takes the site's robots.txt, or why there is none; returns the rows that waited."""
        says: Rules | Rejected | Exception
        match answer:
            case bytes():
                says = parse(answer)
            case Rejected() if not is_transient(answer.reason):
                # What leads nowhere (a forbidden redirect, no such name) allows all like 4xx; each row finds that out.
                says = ALL_ALLOWED
            case Rejected():
                says = Rejected(answer.reason, "robots.txt did not come")
            case _:
                says = answer
        is_an_answer = not isinstance(answer, Rejected) or answer.reason == Reason.HTTP_4XX
        if isinstance(says, Rules) and is_an_answer:
            self._cache.put(site, says)
        seconds = TTL_S if isinstance(says, Rules) else self._cool_down_s
        with self._lock:
            self._known[site] = (time.monotonic() + seconds, says)
            return self._waiting.pop(site)

    def close(self) -> None:
        """Closes the cache."""
        self._cache.close()


class NodeCache:
    """Rules by site, shared by the workers of a node: a SQLite file below TMPDIR, of this user alone.

    It may be deleted at any time. SQLite survives kills by itself; a file that it can't read is removed, and what is
    locked or broken counts as not there.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or Path(tempfile.gettempdir()) / f"armchair-robots-{os.getuid()}"
        self._path = self._directory / "robots-1.sqlite3"  # 1: its format
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._is_off = False

    def get(self, site: str) -> Rules | None:
        """The rules of a site (`https://a.example`) if somebody on this node read them within `TTL_S`."""
        found = self._do("SELECT until_s, rules FROM robots WHERE site = ?", (site,))
        try:
            (until_s, rules) = found[0]
            # A clock that was set back must not keep a row for ever.
            if not 0 < until_s - time.time() <= TTL_S:
                return None
            return Rules(tuple((str(pattern), bool(allows)) for pattern, allows in json.loads(rules)))
        except (IndexError, TypeError, ValueError):
            return None

    def put(self, site: str, rules: Rules) -> None:
        """Keeps rules for the other workers."""
        self._do("INSERT OR REPLACE INTO robots VALUES (?, ?, ?)", (site, time.time() + TTL_S, json.dumps(rules.rules)))

    def close(self) -> None:
        """Closes the file; what is asked later is not found."""
        with self._lock:
            self._end()

    def _do(self, statement: str, values: Sequence[object]) -> list[tuple[float, str]]:
        with self._lock:
            if self._is_off:
                return []
            try:
                self._database = self._database or self._open()
                return self._database.execute(statement, values).fetchall()
            except sqlite3.OperationalError as error:  # locked, full, or a directory that can't be written
                if self._database is None or "no such table" in str(error):
                    self._end()
            except (sqlite3.DatabaseError, OSError):  # torn
                self._end()
                for path in self._directory.glob(f"{self._path.name}*"):  # its journal too
                    path.unlink(missing_ok=True)
            return []

    def _open(self) -> sqlite3.Connection:
        if not self._directory.exists():
            self._directory.mkdir(mode=0o700, exist_ok=True)
        found = self._directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise sqlite3.OperationalError("somebody else's")  # a stranger's rules would decide what we ask for
        database = sqlite3.connect(self._path, timeout=2.0, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = OFF")
            database.execute(
                "CREATE TABLE IF NOT EXISTS robots (site TEXT PRIMARY KEY, until_s REAL, rules TEXT) WITHOUT ROWID"
            )
            database.execute("DELETE FROM robots WHERE until_s < ?", (time.time(),))
        except BaseException:
            database.close()
            raise
        return database

    def _end(self) -> None:
        self._is_off = True
        if self._database is not None:
            self._database.close()
            self._database = None
