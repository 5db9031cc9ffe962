"""How often codes are used: counted exactly, from a bounded number of shards, and shown as pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from infra.store import LocalStore
from ops import code_usage
from ops.code_usage import CodeUsage, code_tiles, read_code_usage
from ops.shards import read_receipts, read_table


def usage_of(counts):
    return CodeUsage(np.array(counts, np.int64), 1, 1, 1)


def test_counts_are_those_of_all_codes(learned):
    store = LocalStore(learned.tokens)
    receipts = read_receipts(store)
    usage = read_code_usage(store, receipts, 32)
    codes = np.concatenate([np.array(read_table(store, r)["codes"].to_pylist()) for r in receipts.values()]).ravel()
    assert usage.counts_V.tolist() == [int((codes == code).sum()) for code in range(32)]
    assert (usage.pictures, usage.shards, usage.of) == (64, 2, 2)


def test_no_more_shards_are_read_than_allowed(learned, monkeypatch):
    monkeypatch.setattr(code_usage, "SHARDS_AT_MOST", 1)
    store = LocalStore(learned.tokens)
    usage = read_code_usage(store, read_receipts(store), 32)
    assert (usage.pictures, usage.shards, usage.of) == (32, 1, 2)


def test_a_code_beyond_the_codebook_is_refused(learned):
    store = LocalStore(learned.tokens)
    with pytest.raises(ValueError, match="the codebook ends at 1"):
        read_code_usage(store, read_receipts(store), 2)


def test_perplexity_is_the_number_of_codes_when_all_are_used_alike():
    assert usage_of([5, 5, 5, 5]).perplexity == pytest.approx(4)
    assert usage_of([7, 0, 0, 0]).perplexity == pytest.approx(1)
    assert usage_of([7, 0, 0, 0]).used_share == 0.25
    assert usage_of([0, 0]).perplexity == pytest.approx(1)


def test_the_most_used_codes_come_first_and_unused_ones_not():
    assert usage_of([2, 9, 0, 9, 1]).most_used(10) == [1, 3, 0, 4]


def test_tiles_of_different_codes_are_different_pictures(learned):
    tiles = code_tiles(str(learned.tokens), [0, 1, 2])
    assert len({bytes(tile) for tile in tiles}) > 1
    assert {Image.open(io.BytesIO(tile)).size for tile in tiles} == {(32, 32)}
