"""How often each code is used, counted in some shards of TOKENS, and what the most used ones look like.

The reading is bounded: at most 16 shards, evenly over all. May not live here: the tokenizer (models/dvae.py), the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.store import Store
from ops.funnel import evenly
from ops.shards import Receipt, read_table

SHARDS_AT_MOST = 16
TILES = 24
TILE_PX = 32
Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class CodeUsage:
    """`counts_V`: how often each code stands in `pictures` pictures of `shards` (of `of`) token shards."""

    counts_V: Counts
    pictures: int
    shards: int
    of: int

    @property
    def shares(self) -> Counts:
        """The share of each code, most used first."""
        ordered: Counts = np.sort(self.counts_V)[::-1] / max(1, self.counts_V.sum())
        return ordered

    @property
    def perplexity(self) -> float:
        """How many codes, if all were used equally often, would be as hard to tell: exp of the entropy."""
        shares = self.shares[self.shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def used_share(self) -> float:
        """The share of the codebook that occurs."""
        return float((self.counts_V > 0).mean())

    def most_used(self, count: int = TILES) -> list[int]:
        """The codes that are used most, the lower number first among equals."""
        order = np.argsort(-self.counts_V, kind="stable")[:count]
        return [int(code) for code in order if self.counts_V[code]]


def read_code_usage(
    store: Store, receipts: Mapping[int, Receipt], vocabulary: int, say: Callable[[str], None] = lambda what: None
) -> CodeUsage:
    """Counts the codes of at most 16 shards, all crops. Raises DamagedArtifact, OSError, ValueError."""
    counts_V: Counts = np.zeros(vocabulary, np.int64)
    chosen, pictures = evenly(sorted(receipts), SHARDS_AT_MOST), 0
    for place, shard in enumerate(chosen, 1):
        say(f"codes: shard {place} of {len(chosen)}")
        column = read_table(store, receipts[shard], columns=["codes"])["codes"].combine_chunks()
        counted = np.bincount(column.flatten().to_numpy(), minlength=vocabulary)
        if len(counted) > vocabulary:
            raise ValueError(
                f"shard {shard:05d} holds code {len(counted) - 1}, and the codebook ends at {vocabulary - 1}"
            )
        counts_V += counted
        pictures += receipts[shard].rows
    return CodeUsage(counts_V, pictures, len(chosen), len(receipts))


def code_tiles(tokenizer: str, codes: list[int]) -> list[bytes]:
    """PNG tiles of codes: the middle of what the decoder of the tokenizer at a place draws from that code everywhere.

    Raises DamagedArtifact and UsageError as `load_tokenizer` does.
    """
    import torch
    from PIL import Image

    from ops.sheets import png, to_pixels
    from ops.trained import load_tokenizer

    dvae, _ = load_tokenizer(tokenizer)
    tiles = []
    for code in codes:
        with torch.no_grad():
            pixels = to_pixels(dvae.decode(torch.full((1, dvae.grid**2), code)))[0]
        side = pixels.shape[0]
        patch = max(1, 2 * side // dvae.grid)  # two positions wide: the texture that a run of this code makes
        first = (side - patch) // 2
        tile = Image.fromarray(pixels[first : first + patch, first : first + patch])
        tiles.append(png(np.asarray(tile.resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST))))
    return tiles
