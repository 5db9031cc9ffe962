"""Lines to stderr about work that takes longer than five seconds: how far it is, how fast, and how long it will take.

May not live here: what the work is. It is handed `Progress.tell` and counts; a thread prints, so that work which has
nothing to count still shows that it lives.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from pipelines.show import duration, size

EVERY_S = 5.0

Show = Callable[[float | None, str], None]
"""(share that is done or None, the line without the stage's name): where else the progress is shown."""


class Progress:
    """A `with` block around the work: a line every five seconds, none for work that is done before.

    With `always` there is a last line however short the work was. `tell` is cheap: call it for each row if you like.
    `note` is a text between the counts and the rate.
    """

    def __init__(self, stage: str, *, always: bool = False, show: Show | None = None, every_s: float = EVERY_S) -> None:
        self.note = ""
        self._stage, self._always, self._show, self._every_s = stage, always, show, every_s
        self._counts: dict[str, tuple[int, int | None]] = {}
        self._leading = ""
        self._began_s = time.monotonic()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._printed = False

    def __enter__(self) -> Progress:
        self._began_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if error is None and (self._always or self._printed):
            self._print(last=True)

    def tell(self, what: str, done: int, total: int | None = None) -> None:
        """So many of `what` are done. Rate and time left are taken from the last kind whose total is known."""
        with self._lock:
            self._counts[what] = done, total
            leads = self._counts.get(self._leading)
            if leads is None or leads[1] is None or total is not None:
                self._leading = what

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self._print()

    def _print(self, *, last: bool = False) -> None:
        share, line = self.line(last=last)
        print(f"{self._stage:<12}{line}", file=sys.stderr, flush=True)
        self._printed = True
        if self._show is not None:
            self._show(share, line)

    def line(self, *, last: bool = False) -> tuple[float | None, str]:
        """(share that is done, what is printed without the stage's name)."""
        with self._lock:
            counts, leading = dict(self._counts), self._leading
        seconds = time.monotonic() - self._began_s
        parts = [_count(what, done, total) for what, (done, total) in counts.items()] + [self.note]
        share, left = None, duration(seconds)
        if leading:
            done, total = counts[leading]
            rate = done / max(seconds, 1e-9)
            if done:
                parts.append(f"{rate:,.3g} {leading}/s")
                parts += [f"{size(counts['bytes'][0] / seconds)}/s"] if "bytes" in counts else []
            if total:
                share = done / total
                if done and not last:
                    left = f"{duration((total - done) / rate)} left"
        return share, "   ".join(filter(None, [*parts, left]))


def _count(what: str, done: int, total: int | None) -> str:
    if what == "bytes":
        return f"{size(done)} of {size(total)}" if total else size(done)
    return f"{done:,}/{total:,} {what}" if total is not None else f"{done:,} {what}"
