"""Captions: any script comes back, EOS is never lost, dropout is reproducible and equals the library's at 0."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.text import BOS, EOS, PAD, CaptionTokenizer, empty_caption, train_bpe

CAPTIONS = [
    f"a {who} {what} with {tone} skin tone"
    for who in ("man", "woman", "person")
    for what in ("firefighter", "judge", "farmer", "astronaut")
    for tone in ("light", "medium", "dark")
] + ["the flag of Japan", "the flag of France", "a red apple", "a red heart", "puzzle piece"]
TOKENIZER = train_bpe(CAPTIONS, 400)
NO_DROPOUT = 1e-300  # goes through our own merges and drops none of them


def tokens(text_BT: torch.Tensor, row: int = 0) -> list[int]:
    return [token for token in text_BT[row].tolist() if token not in (BOS, EOS, PAD)]


def test_a_caption_is_bos_tokens_eos_pads():
    text = TOKENIZER.encode(["a red apple", ""], 16)
    assert text.shape == (2, 16)
    assert text.dtype == torch.int64
    row = text[0].tolist()
    end = row.index(EOS)
    assert row[0] == BOS
    assert all(token > EOS for token in row[1:end])
    assert row[end + 1 :] == [PAD] * (15 - end)
    assert int(text.max()) < TOKENIZER.vocabulary <= 400
    assert torch.equal(text[1], empty_caption(16))


def test_a_long_caption_loses_its_end_and_keeps_its_eos():
    long = " ".join(CAPTIONS)
    text = TOKENIZER.encode([long], 8)[0].tolist()
    assert (text[0], text[-1]) == (BOS, EOS)
    assert PAD not in text
    assert text[1:7] == TOKENIZER.encode([long], 64)[0, 1:7].tolist()


def test_no_positions_for_bos_and_eos_is_refused():
    with pytest.raises(ValueError, match="1 text positions can't hold BOS and EOS"):
        TOKENIZER.encode(["x"], 1)


@pytest.mark.parametrize(
    "caption",
    ["日の丸", "علم اليابان", "👩🏽‍🚒 firefighter", "naïve café", "x\x00y", "<s> </s> [PAD] <|endoftext|>", "Ā\u0301"],
)
def test_any_script_comes_back(caption: str):
    text = TOKENIZER.encode([caption], 128)
    assert EOS in text[0].tolist()
    assert TOKENIZER.decode(text[0]) == TOKENIZER._bpe.normalizer.normalize_str(caption)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_every_text_encodes_and_decodes_to_its_normal_form_which_is_stable(caption: str):
    decoded = TOKENIZER.decode(TOKENIZER.encode([caption], 400)[0])
    assert decoded == TOKENIZER._bpe.normalizer.normalize_str(caption)
    again = TOKENIZER.decode(TOKENIZER.encode([decoded], 400)[0])
    assert again == TOKENIZER._bpe.normalizer.normalize_str(decoded)


def test_a_prompt_that_is_no_unicode_is_spelled_out_not_fatal():
    assert TOKENIZER.decode(TOKENIZER.encode(["caf\udce9"], 32)[0]) == "caf\\udce9"


def test_captions_are_lower_cased_and_spaces_are_one():
    assert torch.equal(TOKENIZER.encode(["  The FLAG\tof  Japan "], 16), TOKENIZER.encode(["the flag of japan"], 16))


def test_frequent_words_are_one_token_wherever_they_stand():
    assert len(tokens(TOKENIZER.encode(["firefighter"], 16))) == 1
    assert tokens(TOKENIZER.encode(["firefighter"], 16))[0] in tokens(TOKENIZER.encode(["a firefighter"], 16))


def test_the_order_of_the_captions_does_not_matter():
    shuffled = CAPTIONS.copy()
    random.Random(0).shuffle(shuffled)
    assert train_bpe(shuffled, 400).to_json() == TOKENIZER.to_json()


def test_the_tokenizer_survives_its_json():
    read = CaptionTokenizer.from_json(TOKENIZER.to_json())
    assert read.to_json() == TOKENIZER.to_json()
    assert read.vocabulary == TOKENIZER.vocabulary
    assert torch.equal(read.encode(CAPTIONS, 16), TOKENIZER.encode(CAPTIONS, 16))
    seeds = list(range(len(CAPTIONS)))
    assert torch.equal(
        read.encode(CAPTIONS, 16, dropout=0.3, seeds=seeds), TOKENIZER.encode(CAPTIONS, 16, dropout=0.3, seeds=seeds)
    )


def test_another_format_is_refused_in_words():
    later = json.dumps({**json.loads(TOKENIZER.to_json()), "format": 2})
    with pytest.raises(ValueError, match="format 2; this version reads 1"):
        CaptionTokenizer.from_json(later)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 258"):
        train_bpe(CAPTIONS, 257)
    assert train_bpe(CAPTIONS, 258).vocabulary == 258


# Dropout ---------------------------------------------------------------------------------------------------------


def test_our_merges_are_the_library_s_where_none_is_dropped():
    ours = TOKENIZER.encode(CAPTIONS, 64, dropout=NO_DROPOUT, seeds=range(len(CAPTIONS)))
    assert torch.equal(ours, TOKENIZER.encode(CAPTIONS, 64))


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("adeflmnr tiuhgé日"), max_size=40))
def test_on_any_text(caption: str):
    ours = TOKENIZER.encode([caption], 128, dropout=NO_DROPOUT, seeds=[0])
    assert torch.equal(ours, TOKENIZER.encode([caption], 128))


def test_dropout_is_decided_by_the_caption_s_own_seed():
    first = TOKENIZER.encode(CAPTIONS[:3], 64, dropout=0.5, seeds=[1, 2, 3])
    assert torch.equal(first, TOKENIZER.encode(CAPTIONS[:3], 64, dropout=0.5, seeds=[1, 2, 3]))
    assert torch.equal(first[1:2], TOKENIZER.encode(CAPTIONS[1:2], 64, dropout=0.5, seeds=[2]))
    assert len({tuple(TOKENIZER.encode([CAPTIONS[0]], 64, dropout=0.5, seeds=[s])[0].tolist()) for s in range(9)}) > 5


def test_dropout_changes_the_tokens_and_not_the_text():
    whole = len(tokens(TOKENIZER.encode([CAPTIONS[0]], 64)))
    counts = []
    for seed in range(50):
        text = TOKENIZER.encode([CAPTIONS[0]], 64, dropout=0.1, seeds=[seed])
        assert TOKENIZER.decode(text[0]) == CAPTIONS[0]
        counts.append(len(tokens(text)))
    assert min(counts) >= whole
    assert whole < sum(counts) / 50 < 2 * whole


def test_dropping_every_merge_leaves_bytes():
    text = TOKENIZER.encode(["red apple"], 64, dropout=1.0, seeds=[0])
    assert len(tokens(text)) == len(" red apple")


def test_dropout_without_seeds_is_refused():
    with pytest.raises(ValueError, match="needs a seed for each caption"):
        TOKENIZER.encode(["x"], 8, dropout=0.1)
