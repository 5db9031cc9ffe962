"""The order of training: which row of which group comes at a position. Mathematics of positions; nothing is read here.

`Order` maps a position to (epoch, group, row) without state: the groups of a snapshot are permuted by (seed, epoch);
each run of W groups in that order is a window, whose rows are permuted together. May not live here: what a row is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ops.seeds import derived_seed

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Place:
    """Where a position lies: `row` counts the selected rows of `group`, `group` those of one epoch."""

    epoch: int
    group: int
    row: int


class Window(NamedTuple):
    """Positions `start` … `stop` - 1: all rows of `groups`, which are permuted together."""

    epoch: int
    number: int
    start: int
    stop: int
    groups: Indices


class Order:
    """A stateless shuffle of rows that come in groups: every row exactly once an epoch, in windows of W groups.

    >>> order = Order([3, 2], seed=0, window_groups=2)
    >>> sorted((p.group, p.row) for p in map(order.at, range(5, 10)))
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    """

    def __init__(self, sizes: Sequence[int] | Indices, seed: int, window_groups: int) -> None:
        """`sizes` are the selected rows of each group. Raises ValueError if there is none."""
        self._sizes = np.asarray(sizes, np.int64)
        self.rows = int(self._sizes.sum())
        if not self.rows:
            raise ValueError("an order over no rows")
        self._seed, self._window_groups = seed, window_groups
        # A lookup is pure, these only make it cheap. Two epochs and two windows: a reader looks one window ahead.
        self._groups_of = lru_cache(maxsize=2)(self._make_groups)
        self._rows_of = lru_cache(maxsize=2)(self._make_rows)

    def at(self, position: int) -> Place:
        """The place of a position (0, 1, … without end)."""
        window = self.window(position)
        groups, rows = self.places(window, position, position + 1)
        return Place(window.epoch, int(groups[0]), int(rows[0]))

    def window(self, position: int) -> Window:
        """The window that a position lies in."""
        epoch, within = divmod(position, self.rows)
        groups, firsts = self._groups_of(epoch)
        number = int(np.searchsorted(firsts, within, side="right")) - 1
        start, stop = (epoch * self.rows + int(first) for first in firsts[number : number + 2])
        return Window(epoch, number, start, stop, self._members(groups, number))

    def places(self, window: Window, start: int, stop: int) -> tuple[Indices, Indices]:
        """(group, row) at each of the positions `start` … `stop` - 1, which lie in `window`."""
        rows, ends = self._rows_of(window.epoch, window.number)
        rows = rows[start - window.start : stop - window.start]
        members = np.searchsorted(ends, rows, side="right")
        return window.groups[members], rows - (ends - self._sizes[window.groups])[members]

    def position(self, place: Place) -> int:
        """The position of a place, which `at` leads back to: one permutation of groups and one of a window's rows.

        >>> order = Order([3, 2], seed=0, window_groups=2)
        >>> order.at(order.position(Place(7, 1, 0)))
        Place(epoch=7, group=1, row=0)
        """
        groups, firsts = self._groups_of(place.epoch)
        number, member = divmod(int(np.flatnonzero(groups == place.group)[0]), self._window_groups)
        rows, ends = self._rows_of(place.epoch, number)
        row = place.row + (ends[member - 1] if member else 0)
        return int(place.epoch * self.rows + firsts[number] + np.flatnonzero(rows == row)[0])

    def _members(self, groups: Indices, window: int) -> Indices:
        return groups[window * self._window_groups : (window + 1) * self._window_groups]

    def _make_groups(self, epoch: int) -> tuple[Indices, Indices]:
        """The groups in the order of an epoch; the position in it at which each window begins, and that of its end."""
        groups = _permutation(len(self._sizes), "groups", self._seed, epoch)
        before = np.concatenate([[0], np.cumsum(self._sizes[groups])])
        return groups, np.append(before[: -1 : self._window_groups], before[-1])

    def _make_rows(self, epoch: int, window: int) -> tuple[Indices, Indices]:
        """The rows of a window in its order, counted over its groups, and where each group ends in that count."""
        ends = np.cumsum(self._sizes[self._members(self._groups_of(epoch)[0], window)])
        return _permutation(int(ends[-1]), "rows", self._seed, epoch, window), ends


def _permutation(n: int, *owners: int | str) -> Indices:
    # Sorting raw bits and not Generator.permutation: numpy promises the same raw stream for ever, not the same shuffle.
    return np.argsort(np.random.PCG64(derived_seed("order", *owners)).random_raw(n), kind="stable")
