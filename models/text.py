"""Captions to tokens and back: lower-cased byte-level BPE trained on the user's captions, seeded dropout (paper, §2.2).

A caption fills T positions: BOS, its tokens, EOS, then pads. Pads are −1: they have no token, for the transformer gives
each position a pad embedding of its own. The empty caption, BOS EOS pads, stands for "no caption".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from random import Random
from typing import Self

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

BOS = 0
EOS = 1
PAD = -1
_SPECIALS = 2
"""BOS and EOS are ids of ours, below the BPE's own: no text of a caption can spell them."""

FORMAT = 1


class CaptionTokenizer:
    """A trained BPE. Any text encodes, for its alphabet is all 256 bytes."""

    def __init__(self, bpe: Tokenizer) -> None:
        self._bpe = bpe
        model = json.loads(bpe.to_str())["model"]
        self._ids: dict[str, int] = model["vocab"]
        self._ranks: dict[tuple[str, str], int] = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self.vocabulary = len(self._ids) + _SPECIALS
        """Tokens are 0 … vocabulary − 1; few captions give fewer than were asked for."""

    def encode(
        self,
        captions: Sequence[str],
        positions: int,
        *,
        dropout: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """text_BT, int64: BOS, tokens, EOS, then −1. A long caption loses its last tokens, never its EOS.

        With `dropout`, each possible merge is skipped with that probability each time it is considered (Provilkov et
        al. 2020); `seeds`, one a caption, then decide which. Raises ValueError if positions < 2, or for dropout without
        seeds.
        """
        if positions < 2:
            raise ValueError(f"{positions} text positions can't hold BOS and EOS")
        if dropout > 0.0 and seeds is None:
            raise ValueError("BPE dropout needs a seed for each caption")
        text_BT = torch.full((len(captions), positions), PAD, dtype=torch.int64)
        for row, caption in enumerate(captions):
            if dropout > 0.0 and seeds is not None:
                ids = self._ids_with_dropout(caption, dropout, Random(seeds[row]))
            else:
                ids = self._bpe.encode(_utf8(caption), add_special_tokens=False).ids
            tokens = [BOS, *(id_ + _SPECIALS for id_ in ids[: positions - 2]), EOS]
            text_BT[row, : len(tokens)] = torch.tensor(tokens)
        return text_BT

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of one caption's tokens; BOS, EOS and pads are left out."""
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        text: str = self._bpe.decode([value - _SPECIALS for value in values if value >= _SPECIALS])
        return text.removeprefix(" ")

    def unknown_characters(self, text: str) -> list[str]:
        """Characters that no token holds whole: the captions of training had them once at most, or never.

        >>> train_bpe(["a red heart ♥", "a blue heart ♥"], 300).unknown_characters("a red ♥ ж ж")
        ['ж']
        """
        normal = self._bpe.normalizer.normalize_str(_utf8(text))
        spelled = (c for c in dict.fromkeys(normal) if len(c.encode()) > 1)
        # At most a space and the character; one that was never learned is spelled in its two to four bytes.
        return [c for c in spelled if len(self._bpe.encode(c, add_special_tokens=False).ids) > 2]

    def to_json(self) -> str:
        """All of it as text, for `from_json`."""
        return json.dumps({"format": FORMAT, "bpe": json.loads(self._bpe.to_str())}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; raises ValueError for another format."""
        content = json.loads(text)
        if content.get("format") != FORMAT:
            raise ValueError(f"a caption tokenizer of format {content.get('format')!r}; this version reads {FORMAT}")
        return cls(Tokenizer.from_str(json.dumps(content["bpe"])))

    def _ids_with_dropout(self, caption: str, dropout: float, random: Random) -> list[int]:
        """Hugging Face's own dropout draws from a generator that can't be seeded; hence the merges in Python."""
        text = self._bpe.normalizer.normalize_str(_utf8(caption))
        words = self._bpe.pre_tokenizer.pre_tokenize_str(text)
        return [self._ids[symbol] for word, _ in words for symbol in self._merge(word, dropout, random)]

    def _merge(self, word: str, dropout: float, random: Random) -> list[str]:
        symbols = list(word)
        while True:
            pairs = pairwise(symbols)
            candidates = [
                (rank, place) for place, pair in enumerate(pairs) if (rank := self._ranks.get(pair)) is not None
            ]
            kept = [candidate for candidate in candidates if random.random() >= dropout]
            if not kept:
                return symbols
            _, place = min(kept)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def train_bpe(captions: Iterable[str], vocabulary: int) -> CaptionTokenizer:
    """A BPE of at most `vocabulary` tokens (BOS, EOS and 256 bytes included, so at least 258) learned on `captions`.

    The same captions give the same tokenizer, in any order. Captions are normalised to NFC and lower case, and their
    white space to single spaces.

    >>> tokenizer = train_bpe(["a red apple", "a green apple", "a red heart"], 300)
    >>> text_BT = tokenizer.encode(["A red  apple"], 8)
    >>> int(text_BT[0, 0]) == BOS, int(text_BT[0, -1]) == PAD, tokenizer.decode(text_BT[0])
    (True, True, 'a red apple')
    """
    smallest = _SPECIALS + 256
    if vocabulary < smallest:
        raise ValueError(f"a byte-level vocabulary has at least {smallest} tokens, not {vocabulary}")
    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    # The space before a word belongs to it, the first word's too: "apple" is one token wherever it stands.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary - _SPECIALS,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator((_utf8(caption) for caption in captions), trainer)
    return CaptionTokenizer(bpe)


def empty_caption(positions: int) -> Tensor:
    """text_T of the caption "": what guidance and caption dropout put in a caption's place.

    >>> empty_caption(4).tolist()
    [0, 1, -1, -1]
    """
    text_T = torch.full((positions,), PAD, dtype=torch.int64)
    text_T[0], text_T[1] = BOS, EOS
    return text_T


def _utf8(text: str) -> str:
    """A prompt from a command line may hold lone surrogates, which the BPE refuses: they are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
