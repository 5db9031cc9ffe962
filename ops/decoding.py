"""Stored JPEGs to the crops that a tokenizer trains on, a batch at a time: in threads of this process, or in children.

A child is a Python of its own with numpy, cv2 and libjpeg, without torch. It is asked through its stdin and answers
with pixels on its stdout, which are read into the batch itself. It ends when its stdin ends, so also when its owner is
killed; where it is killed itself, another one takes its place. What a crop is depends on (JPEG, seed) alone, so both
ways give the same bytes. May not live here: which pictures, in which order (ops/reader.py); tensors.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

import numpy as np

from ops.errors import DamagedArtifact
from ops.pictures import decode_stored, tokenizer_crop

if TYPE_CHECKING:
    from ops.pictures import Pixels

CHUNK = 16
"""Pictures that a child is asked for at once, at most: 4 MB of pixels at 256 px."""
PIPE_BYTES = 1 << 20
"""Of a child's pipes, where the system allows it: a picture of 256 px in one go, not in four."""
PROCESSES_FROM_CORES = 4
"""Fewer cores decode in threads: a child takes 40 MB, and a core from the step."""
DEATHS = 3
"""A picture at which so many children died, twice alone with it, is said to be the cause."""
_READY = b"\n"
_SERVE = "from ops.decoding import serve; serve()"


class Stored(NamedTuple):
    """A picture to be decoded: its JPEG, and the seed of its crop."""

    uid: str
    jpeg: bytes
    seed: int


class Decoders:
    """Decodes and crops batches; a context manager that ends its children. Threads may share it.

    >>> import numpy as np
    >>> from ops.pictures import encode_jpeg
    >>> jpeg = encode_jpeg(np.zeros((48, 40, 3), np.uint8), 90)
    >>> with Decoders("pairs", size=16) as decoders:
    ...     decoders.crops([Stored("ab", jpeg, 0), Stored("cd", jpeg, 1)], crop=True, flip=True).shape
    (2, 16, 16, 3)
    """

    def __init__(self, place: str, size: int, *, threads: int = 1, processes: int = 0) -> None:
        """Of pictures of `place` (for words of errors) to `size` px: in `processes` children, with 0 in `threads`."""
        self.place, self.size = place, size
        self._workers = processes or max(1, threads)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        self._children = _Children(processes) if processes else None
        self._chunk = CHUNK if processes else 1
        self._end = weakref.finalize(self, _end, self._pool, self._children)

    @classmethod
    def of_rank(cls, place: str, size: int, world: int) -> Decoders:
        """Those of one of `world` ranks: children for all its cores but one, or threads where it has only a few.

        A step of many small operations keeps Python busy, and threads of its process wait for Python in turn; children
        do not (tests/bench/read.py). With two cores a child takes one of them from the step.
        """
        cores = cores_of_rank(world)
        return cls(place, size, threads=cores, processes=cores - 1 if cores >= PROCESSES_FROM_CORES else 0)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the children. Happens by itself where the object is no longer used, and at the end of the process."""
        self._end()

    def crops(self, pictures: Sequence[Stored], *, crop: bool, flip: bool) -> Pixels:
        """pixels_BHWC uint8, by `tokenizer_crop`.

        Raises DamagedArtifact that names the picture if its JPEG is damaged, or kills who decodes it; ChildProcessError
        if a child can't be started.
        """
        pixels_BHWC = np.empty((len(pictures), self.size, self.size, 3), np.uint8)
        # At least two chunks a worker, so that all end at about the same time.
        size = max(1, min(self._chunk, -(-len(pictures) // (2 * self._workers))))
        work = crop_into if self._children is None else self._children.crop_into
        chunks = [slice(first, first + size) for first in range(0, len(pictures), size)]
        futures = [self._pool.submit(work, pixels_BHWC[some], pictures[some], crop, flip) for some in chunks]
        wait(futures)
        for future in futures:
            if (found := future.result()) is not None:
                uid, what = found
                raise DamagedArtifact(f"{self.place}, picture {uid}", "a sound JPEG", what)
        return pixels_BHWC


def cores_of_rank(world: int) -> int:
    """The cores of this machine that one of `world` ranks has; of a run on several machines Ray Train says how many
    ranks are here."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world)))


def crop_into(pixels_BHWC: Pixels, pictures: Sequence[Stored], crop: bool, flip: bool) -> tuple[str, str] | None:
    """Decodes and crops, here. (uid, what is wrong) of the first that is damaged; None if all went well."""
    for pixels, (uid, jpeg, seed) in zip(pixels_BHWC, pictures, strict=True):
        try:
            picture = decode_stored(jpeg)
        except ValueError as error:
            return uid, str(error)
        pixels[:] = tokenizer_crop(picture, len(pixels), np.random.default_rng(seed), crop=crop, flip=flip)
    return None


class _Died(Exception):
    """A child ended in the middle of its work: its exit code."""


class _Children:
    """The children of one owner, each asked by one thread at a time. They start when they are asked first."""

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)  # a child that is to be started
        self.alive: set[_Child] = set()
        self._has_ended = False
        self._lock = threading.Lock()

    def crop_into(
        self, pixels_BHWC: Pixels, pictures: Sequence[Stored], crop: bool, flip: bool, deaths: int = 0
    ) -> tuple[str, str] | None:
        """What the function of this name does, in a child."""
        child = self._free.get()
        try:
            if child is None:
                child = self._started()
            return child.crop_into(pixels_BHWC, pictures, crop, flip)
        except _Died as error:
            assert child is not None
            self.alive.discard(child)
            child, deaths, how = None, deaths + 1, _in_words(error.args[0])
        finally:
            self._free.put(child)
        # Killed, by the system that wanted its memory or by a picture. All once more, each alone.
        if deaths == DEATHS:
            return pictures[0].uid, f"{DEATHS} processes that decoded it {how}"
        for at in range(len(pictures)):
            found = self.crop_into(pixels_BHWC[at : at + 1], pictures[at : at + 1], crop, flip, deaths)
            if found is not None:
                return found
        return None

    def end(self) -> None:
        with self._lock:
            self._has_ended = True
            for child in self.alive:
                child.end()
            self.alive.clear()

    def _started(self) -> _Child:
        child = _Child()
        with self._lock:
            if self._has_ended:
                child.end()
                raise ChildProcessError("the processes that decode pictures were ended")
            self.alive.add(child)
        return child


class _Child:
    """One child and its two pipes."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # it has one CPU
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._ask = cast(io.BufferedWriter, self._process.stdin)
        self._answer = cast(io.BufferedReader, self._process.stdout)
        self.pid = self._process.pid
        for pipe in (self._ask, self._answer):
            with contextlib.suppress(ImportError, OSError):
                from fcntl import F_SETPIPE_SZ, fcntl

                fcntl(pipe, F_SETPIPE_SZ, PIPE_BYTES)
        if self._answer.read(1) != _READY:
            raise ChildProcessError(f"a process that decodes pictures did not start: it {_in_words(self.end())}")

    def crop_into(
        self, pixels_BHWC: Pixels, pictures: Sequence[Stored], crop: bool, flip: bool
    ) -> tuple[str, str] | None:
        """Asks, and reads the answer into `pixels_BHWC`. Raises _Died."""
        try:
            pickle.dump((len(pixels_BHWC[0]), [tuple(picture) for picture in pictures], crop, flip), self._ask)
            self._ask.flush()
            found: tuple[str, str] | None = pickle.load(self._answer)
            if found is None and self._answer.readinto(pixels_BHWC.data.cast("B")) != pixels_BHWC.nbytes:
                raise EOFError
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise _Died(self.end()) from error
        return found

    def end(self) -> int:
        """Its exit code; it is killed if it has not ended yet, for there is nothing that it could lose."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._ask.close()
        self._answer.close()
        return self._process.wait()


def serve() -> None:
    """The life of a child: answers until its stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for its owner
    # Whatever a library prints is not to be taken for an answer.
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    crop_into(np.empty((0, 1, 1, 3), np.uint8), [], False, False)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the owner is gone
        _serve(asked, answers)
    os._exit(0)  # what is left in the buffer of a broken pipe can't be flushed


def _serve(asked: BinaryIO, answers: BinaryIO) -> None:
    answers.write(_READY)
    answers.flush()
    while True:
        size, pictures, crop, flip = pickle.load(asked)
        pixels_BHWC = np.empty((len(pictures), size, size, 3), np.uint8)
        found = crop_into(pixels_BHWC, [Stored(*picture) for picture in pictures], crop, flip)
        pickle.dump(found, answers)
        if found is None:
            answers.write(pixels_BHWC.data.cast("B"))
        answers.flush()


def _end(pool: ThreadPoolExecutor, children: _Children | None) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    if children is not None:
        children.end()


def _in_words(code: int) -> str:
    """How a process ended.

    >>> _in_words(-9), _in_words(1)
    ('was killed by signal 9', 'ended with 1')
    """
    return f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
