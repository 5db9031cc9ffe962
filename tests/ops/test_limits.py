from __future__ import annotations

import socket
import threading
import time

import pytest

from ops.limits import Budget, Clock, Reaper, Room


def test_a_clock_stands_still_while_its_row_waits_and_ends_with_its_shard() -> None:
    clock = Clock(5, float("inf"))
    clock.stop()
    before = clock.at
    time.sleep(0.05)
    clock.go_on()
    assert clock.at - before >= 0.05
    clock.stop(time.monotonic() + 9)  # a wait that counts, and is not over
    before = clock.at
    clock.go_on()
    assert clock.at == before
    assert Clock(5, 3.0).at == 3.0


def test_the_reaper_ends_a_read_at_its_time_and_again_when_that_is_moved() -> None:
    reaper = Reaper()
    for move_s in (None, 0.3):
        ours, theirs = socket.socketpair()
        start = time.monotonic()
        with reaper.watch(start + 0.1) as watch:
            watch.attach(ours)
            if move_s:
                reaper.move(watch, start + move_s)
            assert ours.recv(1) == b""
            assert watch.expired
            with pytest.raises(TimeoutError):
                watch.attach(ours)
            watch.close()
        assert (move_s or 0.1) <= time.monotonic() - start < 3
        theirs.close()
    reaper.close()


def test_a_closed_reaper_lets_nothing_begin() -> None:
    reaper = Reaper()
    reaper.close()
    with reaper.watch(time.monotonic() + 60) as watch:
        assert watch.expired


def test_growing_leaves_room_for_one_elder_that_comes_to_its_end() -> None:
    budget = Budget(10, 6, threading.Event())
    elder, younger = Room(), Room()
    soon = time.monotonic() + 0.05
    assert budget.take(elder, 4, soon, is_whole=False)
    assert budget.take(younger, 2, soon, is_whole=False)  # from the reserve: it is the elder now
    assert not budget.take(elder, 1, time.monotonic() + 0.05, is_whole=False)
    assert budget.take(younger, 4, soon, is_whole=False)
    budget.keep(younger, 0)
    assert budget.take(elder, 2, time.monotonic() + 1, is_whole=False)
    budget.keep(elder, 0)
    assert budget.take(Room(), 10, time.monotonic() + 1, is_whole=True)
