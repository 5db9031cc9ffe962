from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from infra.store import LocalStore
from ops.contact_sheet import CELL_PX, GAP_PX, contact_sheet
from ops.shards import read_receipts
from tests.small_runs import COLOURS, drawn


def test_the_sheet_shows_the_kept_pictures_in_their_order(make_pairs: Callable[..., Path]) -> None:
    store = LocalStore(make_pairs(shards=2, rows=5))  # every fifth row is rejected: eight pictures
    sheet = contact_sheet(store, read_receipts(store).values())
    assert sheet is not None
    pixels = np.asarray(Image.open(io.BytesIO(sheet)))
    assert pixels.shape == (CELL_PX + 2 * GAP_PX, 8 * (CELL_PX + GAP_PX) + GAP_PX, 3)
    for cell, number in enumerate([0, 1, 2, 3, 5, 6, 7, 8]):
        colour = COLOURS[drawn(number, 32)[0].split()[1]]
        middle = pixels[GAP_PX + CELL_PX // 2, GAP_PX + cell * (CELL_PX + GAP_PX) + CELL_PX // 2]
        assert np.abs(middle.astype(int) - colour).max() < 40, number


def test_no_more_pictures_are_read_than_fit(make_pairs: Callable[..., Path]) -> None:
    store = LocalStore(make_pairs(shards=2, rows=5))
    first, second = read_receipts(store).values()
    (store.root / second.files["tar"].key).unlink()
    assert contact_sheet(store, [first, second], pictures=4)


def test_there_is_no_sheet_of_nothing(make_pairs: Callable[..., Path]) -> None:
    assert contact_sheet(LocalStore(make_pairs(shards=1, rows=5)), []) is None
