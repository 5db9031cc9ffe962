from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.order import Order
from ops.recipes import sha256


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any),
    seed=st.integers(0, 5),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_row_once_and_touches_a_window_of_groups_at_a_time(
    sizes: list[int], seed: int, window: int, epoch: int
) -> None:
    order = Order(sizes, seed, window)
    positions = range(epoch * order.rows, (epoch + 1) * order.rows)
    places = [order.at(position) for position in positions]
    assert [order.position(place) for place in places] == list(positions)
    assert Counter((place.group, place.row) for place in places) == Counter(
        (group, row) for group, size in enumerate(sizes) for row in range(size)
    )
    assert {place.epoch for place in places} == {epoch}
    # A group is opened once: it never comes back after more than `window` others were seen since its first row.
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, place in enumerate(places):
        first.setdefault(place.group, at)
        last[place.group] = at
    for at in range(len(places)):
        assert sum(first[group] <= at <= last[group] for group in first) <= window


def test_a_position_means_the_same_whatever_was_read_before() -> None:
    sizes = [5, 3, 8, 1, 4]
    walked = Order(sizes, seed=3, window_groups=2)
    in_turn = [walked.at(position) for position in range(100)]
    jumps = np.random.default_rng(0).permutation(100)
    jumped = Order(sizes, seed=3, window_groups=2)
    assert all(jumped.at(int(position)) == in_turn[position] for position in jumps)


def test_the_order_is_the_one_that_runs_of_earlier_versions_began_with() -> None:
    order = Order([3, 0, 5, 2, 7, 1, 4], seed=5, window_groups=2)
    in_turn = [(place.group, place.row) for place in map(order.at, range(20, 44))]
    assert in_turn[:13] == [
        *((6, 2), (6, 3), (0, 1), (0, 2), (3, 0), (0, 0), (3, 1)),
        *((4, 1), (4, 0), (4, 2), (4, 3), (5, 0), (4, 4)),
    ]
    assert in_turn[20:] == [(6, 2), (6, 1), (6, 3), (6, 0)]  # the next epoch
    large = Order([251, 250, 0, 256, 13] * 40, seed=1, window_groups=16)
    places = [(place.epoch, place.group, place.row) for place in map(large.at, range(20_000, 60_000))]
    assert sha256(json.dumps(places).encode()) == "c1489708119e6f27c82f3169cf119e49f5055f5b481f245fae0b44b02d5fb418"


def test_the_places_of_a_window_are_those_of_its_positions() -> None:
    order = Order([3, 0, 5, 2, 0, 0, 7, 1, 4, 0, 0], seed=2, window_groups=2)  # some windows may be empty
    position, windows = 0, []
    while position < 3 * order.rows:
        window = order.window(position)
        assert window.start == position < window.stop
        windows.append(window)
        groups, rows = order.places(window, window.start, window.stop)
        expected = [order.at(at) for at in range(window.start, window.stop)]
        assert [*zip(groups.tolist(), rows.tolist(), strict=True)] == [(place.group, place.row) for place in expected]
        assert {place.epoch for place in expected} == {window.epoch}
        assert set(groups.tolist()) <= set(window.groups.tolist())
        position = window.stop
    assert position == 3 * order.rows  # no window crosses from one epoch into the next


def test_a_windowed_shuffle_is_near_a_full_one() -> None:
    """10,000 rows a shard, as they come: 40 groups each. What differs is how many shards the rows of a batch are of."""
    shards, groups, rows, window, batch = 400, 40, 64, 16, 64
    order = Order([rows] * (shards * groups), seed=0, window_groups=window)
    at = [order.window(start) for start in range(0, order.rows, window * rows)]
    places = [order.places(each, each.start, each.stop) for each in at]
    shard = np.concatenate([of for of, _ in places]) // groups
    row = np.concatenate([of for of, _ in places]) * rows + np.concatenate([of for _, of in places])
    full = np.random.default_rng(0).permutation(len(shard))

    def of_batches(values: np.ndarray) -> float:
        """Variance of the means of batches, as a multiple of that of independent rows (1)."""
        return float(values.reshape(-1, batch).mean(1).var() * batch / values.var())

    rng = np.random.default_rng(1)
    of_row, of_shard = rng.normal(size=len(shard)), rng.normal(size=shards)[shard]
    neighbours = {name: float(np.mean(np.diff(x) == 0)) for name, x in (("window", shard), ("full", shard[full]))}
    print(f"neighbours of one shard: {neighbours['window']:.4f} in windows, {neighbours['full']:.4f} in a full shuffle")
    print(f"variance of batches: {of_batches(of_row[row]):.3f} of a value by row, {of_batches(of_shard):.3f} by shard")
    print(f"in a full shuffle: {of_batches(of_row[full]):.3f} and {of_batches(of_shard[full]):.3f}")
    # Rows are dealt to shards by hash, so a value is one by row, and batches are as in a full shuffle.
    assert of_batches(of_row[row]) == pytest.approx(1, abs=0.06)
    assert of_batches(of_shard[full]) == pytest.approx(1, abs=0.06)
    # If a shard had something of its own, a batch would show it as 16 groups would: 1 + (64 - 1) / 16 and no more.
    assert of_batches(of_shard) < 1.2 * (1 + (batch - 1) / window)
    assert neighbours["window"] < 1.1 * (1 / window + 1 / shards)
    # Where a shard's rows come in an epoch says nothing of its number: neighbours in the file come far from each other.
    position = np.empty(len(row))
    position[row] = np.arange(len(row))
    of_group = position.reshape(-1, rows).mean(1)
    far = float(np.mean(np.abs(np.diff(of_group)))) / len(row)
    print(f"groups that are neighbours in a file are {far:.3f} of an epoch apart (a full shuffle of them: 0.333)")
    assert far == pytest.approx(1 / 3, abs=0.02)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def walk(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = Order([20, 20, 20], seed, 2)
        return [(p.group, p.row) for p in map(order.at, range(60 * epoch, 60 * epoch + 60))]

    walks = [walk(0, 0), walk(0, 1), walk(1, 0)]
    assert all(a != b for i, a in enumerate(walks) for b in walks[i + 1 :])


def test_a_window_of_one_group_still_shuffles_within_it() -> None:
    rows = [Order([50], 0, 1).at(position).row for position in range(50)]
    assert rows != sorted(rows)
