from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import ops.decoding
from ops.decoding import Decoders, Stored, cores_of_rank
from ops.errors import DamagedArtifact
from ops.pictures import decode_stored, encode_jpeg, tokenizer_crop

ROOT = Path(__file__).parent.parent.parent


def _pictures(count: int) -> list[Stored]:
    rng = np.random.default_rng(0)
    sides = [(40 + i % 7, 60 - i % 5, 3) for i in range(count)]
    return [Stored(f"{i:032x}", encode_jpeg(rng.integers(0, 256, s, np.uint8), 90), i) for i, s in enumerate(sides)]


def _expected(pictures: list[Stored], size: int, crop: bool = True, flip: bool = True) -> np.ndarray:
    crops = [
        tokenizer_crop(decode_stored(jpeg), size, np.random.default_rng(seed), crop=crop, flip=flip)
        for _, jpeg, seed in pictures
    ]
    return np.stack(crops)


def _pids(decoders: Decoders) -> list[int]:
    assert decoders._children is not None
    return [child.pid for child in decoders._children.alive]


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("threads", "processes"), [(1, 0), (3, 0), (0, 1), (0, 2)])
def test_crops_are_those_of_the_paper_in_the_order_asked_for_whoever_makes_them(threads: int, processes: int) -> None:
    pictures = _pictures(37)
    with Decoders("pairs", 24, threads=threads, processes=processes) as decoders:
        for crop, flip in ((True, True), (False, False)):
            made = decoders.crops(pictures, crop=crop, flip=flip)
            assert made.dtype == np.uint8
            assert np.array_equal(made, _expected(pictures, 24, crop, flip))
        assert decoders.crops([], crop=True, flip=True).shape == (0, 24, 24, 3)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_picture_that_is_damaged_is_named_and_the_next_batch_is_sound(processes: int) -> None:
    pictures = _pictures(20)
    damaged = [*pictures]
    damaged[13] = Stored(pictures[13].uid, pictures[13].jpeg[:300], 13)
    with Decoders("runs/pairs", 24, threads=2, processes=processes) as decoders:
        with pytest.raises(DamagedArtifact, match=f"runs/pairs, picture {pictures[13].uid} is damaged"):
            decoders.crops(damaged, crop=True, flip=True)
        assert np.array_equal(decoders.crops(pictures, crop=True, flip=True), _expected(pictures, 24))


def test_children_import_no_torch_and_no_ray() -> None:
    with Decoders("pairs", 24, processes=1) as decoders:
        decoders.crops(_pictures(2), crop=True, flip=True)
        [pid] = _pids(decoders)
        maps = Path(f"/proc/{pid}/maps").read_text()
    assert "simplejpeg" in maps
    assert not [name for name in ("/torch/", "/ray/", "/pyarrow/", "/prefect/") if name in maps]


def test_a_child_that_was_killed_is_replaced_between_batches_and_within_one() -> None:
    pictures = _pictures(400)
    with Decoders("pairs", 24, processes=2) as decoders:
        decoders.crops(pictures[:64], crop=True, flip=True)
        before = _pids(decoders)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert np.array_equal(decoders.crops(pictures, crop=True, flip=True), _expected(pictures, 24))
        after = _pids(decoders)
        assert len(after) == 2
        assert not set(before) & set(after)
        # A child that is stopped has work in its hands: that it is killed then is noticed in the middle of a batch.
        os.kill(after[0], signal.SIGSTOP)
        kill = threading.Timer(0.3, os.kill, (after[0], signal.SIGKILL))
        kill.start()
        assert np.array_equal(decoders.crops(pictures, crop=True, flip=True), _expected(pictures, 24))
        kill.join()
        assert after[0] not in _pids(decoders)


def test_a_picture_that_kills_who_decodes_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = _pictures(30)
    poison = len(pictures[17].jpeg)
    assert [len(picture.jpeg) for picture in pictures].count(poison) == 1
    faulty = f"""
import os
from ops import decoding
sound = decoding.decode_stored
decoding.decode_stored = lambda jpeg: os.kill(os.getpid(), 11) if len(jpeg) == {poison} else sound(jpeg)
decoding.serve()
"""
    monkeypatch.setattr(ops.decoding, "_SERVE", faulty)
    with Decoders("pairs", 24, processes=2) as decoders:
        with pytest.raises(DamagedArtifact, match=rf"picture {pictures[17].uid} .*3 processes .* killed by signal 11"):
            decoders.crops(pictures, crop=True, flip=True)
        others = pictures[:17] + pictures[18:]
        assert np.array_equal(decoders.crops(others, crop=True, flip=True), _expected(others, 24))


def test_a_child_that_can_not_start_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.decoding, "_SERVE", "raise SystemExit(3)")
    with Decoders("pairs", 24, processes=2) as decoders:
        with pytest.raises(ChildProcessError, match="did not start: it ended with 3"):
            decoders.crops(_pictures(8), crop=True, flip=True)


def test_no_child_is_left_when_the_decoders_are_closed_or_forgotten() -> None:
    with Decoders("pairs", 24, processes=2) as closed:
        closed.crops(_pictures(8), crop=True, flip=True)
        pids = _pids(closed)
    assert len(pids) == 2
    assert not any(map(_is_alive, pids))
    forgotten = Decoders("pairs", 24, processes=2)
    forgotten.crops(_pictures(8), crop=True, flip=True)
    pids = _pids(forgotten)
    del forgotten
    gc.collect()
    _until(lambda: not any(map(_is_alive, pids)))


OWNER = """
import sys, time
from tests.ops.test_decoding import _pictures, _pids
from ops.decoding import Decoders
decoders = Decoders("pairs", 24, processes=2)
pictures = _pictures(64)
decoders.crops(pictures, crop=True, flip=True)
print(*_pids(decoders), flush=True)
while True:
    decoders.crops(pictures, crop=True, flip=True) if sys.argv[1] == "busy" else time.sleep(1)
"""


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_no_child_outlives_an_owner_that_was_killed(state: str) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, state], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        try:
            assert len(pids) == 2
            assert all(map(_is_alive, pids))
            time.sleep(0.2)
        finally:
            owner.kill()
        _until(lambda: not any(map(_is_alive, pids)))


def test_a_rank_has_its_share_of_the_cores_of_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores_of_rank(1) == cores
    assert cores_of_rank(10 * cores) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # 16 machines with a rank each
    assert cores_of_rank(16) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    with Decoders.of_rank("pairs", 24, 16) as many:
        assert many._workers == 7
        assert many._children is not None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with Decoders.of_rank("pairs", 24, 16) as few:
        assert (few._workers, few._children) == (2, None)
