from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import numpy as np
import pytest

import ops.drops
from infra.store import LocalStore
from ops.contact_sheet import contact_sheet
from ops.drops import (
    add_drops,
    copy_drops,
    drop_rows,
    from_hex,
    hashes,
    is_among,
    list_drops,
    read_drop_rows,
    read_drops,
    url_hash,
    warn_of_drops,
    whole,
)
from ops.errors import DamagedArtifact
from ops.funnel import read_funnel
from ops.reasons import SUCCESS
from ops.shards import read_receipts, read_table
from ops.sweep import sweep
from ops.tokenize import pending_tasks, start_tokens, tokenize_shard
from ops.verify import verify
from tests.ops.conftest import Learned, MakePairs
from tests.small_runs import TOKENS, write_pair_shard

A, B, C = (bytes([number]) * 16 for number in (1, 2, 3))


def uid(number: int) -> bytes:
    return number.to_bytes(16)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(ops.drops).failed == 0


def test_hashes_that_end_in_zeros_are_told_apart() -> None:
    some = hashes([b"\1" + bytes(15), b"\1\1" + bytes(14), bytes(16)])
    assert [whole(value).hex() for value in some.tolist()] == ["00" * 16, "01" + "00" * 15, "0101" + "00" * 14]
    assert is_among(from_hex(["01" + "00" * 15, "01" * 16, "00" * 16]), some).tolist() == [True, False, True]


def test_the_same_drops_are_one_file_and_written_once(tmp_path: Path) -> None:
    one, other = LocalStore(tmp_path / "one"), LocalStore(tmp_path / "other")
    rows = [(A, None), (B, url_hash("http://a/1.jpg")), (None, url_hash("http://a/1.jpg"))]
    assert add_drops(one, drop_rows(rows, "takedown")) == 3
    assert add_drops(one, drop_rows(rows, "takedown")) == 0
    assert add_drops(other, drop_rows(rows[::-1], "takedown")) == 3
    assert list_drops(one) == list_drops(other)
    assert one.read(list_drops(one)[0]) == other.read(list_drops(one)[0])
    assert add_drops(one, drop_rows([(A, None), (C, None)], "takedown")) == 1, "of a longer file what is new"
    assert len(list_drops(one)) == 2
    drops = read_drops(one)
    assert [whole(value) for value in drops.uids.tolist()] == [A, B, C]
    assert [whole(value) for value in drops.urls.tolist()] == [url_hash("http://a/1.jpg")]


def test_a_copy_that_is_taken_down_is_in_the_lists_as_both(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    add_drops(store, drop_rows([(A, None)], "duplicate", [B]))
    assert add_drops(store, drop_rows([(A, None)], "duplicate", [C])) == 0, "the pair that stays is not changed"
    assert add_drops(store, drop_rows([(A, None)], "takedown")) == 1
    assert {(row["kind"], row["stays"]) for row in read_drop_rows(store).to_pylist()} == {
        ("duplicate", B.hex()),
        ("takedown", None),
    }


def test_a_list_whose_bytes_changed_is_refused_by_readers_and_named_by_verify(make_pairs: MakePairs) -> None:
    pairs = make_pairs(shards=1)
    store = LocalStore(pairs)
    add_drops(store, drop_rows([(uid(1), None)], "takedown"))
    (key,) = list_drops(store)
    assert not [problem for problem in verify(store).problems if "drops/" in problem.what]
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data), if_absent=False)
    with pytest.raises(DamagedArtifact, match=key):
        read_drop_rows(store)
    assert [key in problem.what for problem in verify(store).problems if problem.shard is None] == [True]
    sampled = read_funnel(store, read_receipts(store))
    assert sampled.examples == {}
    assert key in sampled.problems[0]


def test_sweep_leaves_drop_lists(make_pairs: MakePairs) -> None:
    store = LocalStore(make_pairs(shards=1))
    add_drops(store, drop_rows([(uid(1), None)], "takedown"))
    before = list_drops(store)
    sweep(store, grace_s=0.0, superseded=True)
    assert list_drops(store) == before


def test_what_is_down_is_on_no_sheet_and_in_no_example_of_the_report(make_pairs: MakePairs) -> None:
    pairs = make_pairs(shards=1, rows=20)
    store = LocalStore(pairs)
    receipts = read_receipts(store)
    kept = [row for row in read_table(store, receipts[0]).to_pylist() if row["status"] == SUCCESS]
    assert contact_sheet(store, receipts.values()) is not None
    add_drops(store, drop_rows([(None, url_hash(kept[0]["url"]))], "takedown"))
    add_drops(store, drop_rows([(bytes.fromhex(row["uid"]), None) for row in kept[2:]], "duplicate", [B] * 14))
    assert [example.url for example in read_funnel(store, receipts).examples[SUCCESS]] == [kept[1]["url"]]
    add_drops(store, drop_rows([(bytes.fromhex(kept[1]["uid"]), None)], "filter"))
    assert contact_sheet(store, receipts.values()) is None
    assert SUCCESS not in read_funnel(store, receipts).examples


def test_what_is_down_is_not_encoded_and_its_receipt_says_that_something_is_missing(
    learned: Learned, tmp_path: Path
) -> None:
    pairs, tokens = shutil.copytree(learned.pairs, tmp_path / "pairs"), tmp_path / "tokens"
    store = LocalStore(pairs)
    add_drops(store, drop_rows([(uid(1), None), (None, url_hash("http://example.org/2"))], "takedown"))

    def encode() -> None:
        start_tokens(str(pairs), str(learned.tokenizer), str(tokens), TOKENS)
        for task in pending_tasks(str(pairs), str(tokens), TOKENS):
            assert tokenize_shard(task).state == "committed"

    encode()
    receipts = read_receipts(LocalStore(tokens))
    uids = set(read_table(LocalStore(tokens), receipts[0])["uid"].to_pylist())
    assert {uid(1).hex(), uid(2).hex()} & uids == set()
    assert len(uids) == receipts[0].kept == read_receipts(store)[0].kept - 2
    assert ["without" in receipt.made_from for receipt in receipts.values()] == [True, False]
    assert list_drops(LocalStore(tokens)) == list_drops(store), "TOKENS stands alone"
    assert verify(LocalStore(tokens), deep=True).ok
    write_pair_shard(pairs, 0, list(range(40)), generation=1)
    add_drops(LocalStore(tokens), drop_rows([(uid(3), None)], "takedown"))
    encode()
    uids = set(read_table(LocalStore(tokens), read_receipts(LocalStore(tokens))[0])["uid"].to_pylist())
    assert {uid(1).hex(), uid(2).hex(), uid(3).hex()} & uids == set(), "nor copied from the generation before"


def test_training_is_warned_while_tokens_lack_drops_of_their_pairs(learned: Learned, tmp_path: Path) -> None:
    for stage in ("pairs", "tokens"):
        shutil.copytree(getattr(learned, stage), tmp_path / stage)
    pairs, tokens = LocalStore(tmp_path / "pairs"), LocalStore(tmp_path / "tokens")
    recipe = tmp_path / "tokens" / "recipe.json"
    recipe.write_text(recipe.read_text().replace(str(learned.pairs), str(tmp_path / "pairs")))
    assert warn_of_drops(tokens) is None
    add_drops(pairs, drop_rows([(uid(1), None), (uid(2), None)], "takedown"))
    told = warn_of_drops(tokens) or ""
    assert "2 drops" in told
    assert told.endswith(f"armchair drop {pairs.location} {tokens.location}")
    add_drops(tokens, drop_rows([(uid(1), None)], "takedown"))
    assert "1 drops" in (warn_of_drops(tokens) or "")
    copy_drops(pairs, tokens)
    assert warn_of_drops(tokens) is None
    shutil.rmtree(tmp_path / "pairs")
    assert warn_of_drops(tokens) is None, "pairs that are gone, or elsewhere, can't be asked"


def test_a_mask_of_codes_goes_by_uids_alone(learned: Learned, tmp_path: Path) -> None:
    tokens = LocalStore(learned.tokens)
    table = read_table(tokens, read_receipts(tokens)[0], ["uid"])
    store = LocalStore(tmp_path)
    add_drops(store, drop_rows([(uid(1), None), (None, url_hash("http://example.org/2"))], "takedown"))
    masked = np.array(table["uid"].to_pylist())[read_drops(store).mask(table)]
    assert set(masked.tolist()) == {uid(1).hex()}
