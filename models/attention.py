"""Which position may attend to which (paper, §2.2, App. B.1, Fig. 11), dense or in blocks; no weights live here.

Text is causal; every image position sees all text. Among image positions (raster order, G a row), n sees m ≤ n if

    dense    always
    row      n − m ≤ G: itself and the G before it. A window of raster order, not "its own row"
    column   (n − m) mod G = 0: the same column, itself and above
    conv     n − m = r·G + c with 0 ≤ r ≤ k/2, |c| ≤ k/2: a k×k window, its causal half; it wraps around at the ends of
             rows, since only the distance in raster order counts

Two forms of one mask: `mask`, every pair of positions, for SDPA; `sparse_mask`, blocks of 128 × 128 positions, for
FlexAttention, which skips the empty ones. In raster order every block of the column mask holds something, so a column
layer reads the image states transposed: of the published size's 55 causal blocks its mask then needs 27 (0.49).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Kind = Literal["dense", "row", "column", "conv"]
Attention = Literal["paper", "dense"]
BLOCK = 128
"""Positions a side of a block of FlexAttention's masks (its default); a sequence of one block has nothing to skip."""
LEAST_HEAD_WIDTH = 16
"""FlexAttention's kernels take no narrower heads."""
RECOMPILES = 64
"""Compiled forms of one function that are kept: kinds × shapes × with or without gradients are more than torch's 8,
beyond which it would go on uncompiled, and FlexAttention uncompiled builds every pair of positions."""


def mask(kind: Kind, text_positions: int, grid: int, conv_kernel: int = 11) -> Tensor:
    """mask_SS, bool, on the CPU: entry [q, k] is True where position q may attend to position k.

    >>> mask("row", 1, 2).int().tolist()  # BOS, then a grid of 2 x 2
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]
    """
    # On the CPU even where a model is built on the meta device: masks are no weights, and nothing would fill them.
    positions = torch.arange(text_positions + grid**2, device="cpu")
    distance_SS = positions[:, None] - positions[None, :]
    causal_SS = distance_SS >= 0
    is_image = positions >= text_positions
    image_to_image_SS = is_image[:, None] & is_image[None, :]
    return causal_SS & (~image_to_image_SS | _is_near(kind, distance_SS, grid, conv_kernel))


def _is_near(kind: Kind, distance: Tensor, grid: int, conv_kernel: int) -> Tensor:
    """Of image positions at this distance n − m ≥ 0 in raster order. Elementwise: FlexAttention compiles it."""
    if kind == "dense":
        return distance >= 0
    if kind == "row":
        return distance <= grid
    if kind == "column":
        return distance % grid == 0
    reach = conv_kernel // 2
    rows = [abs(distance - row * grid) <= reach for row in range(reach + 1)]
    return functools.reduce(torch.logical_or, rows)


@dataclass(frozen=True, eq=False)
class SparseMask:
    """A mask in blocks, the order of the positions that it is for, and the function that attends under it."""

    blocks: BlockMask
    text_positions: int
    grid: int
    is_transposed: bool
    """Whether image positions are in column-major order; text always comes first, as it is."""
    flex: Callable[..., Tensor]

    def arranged(self, x_BSD: Tensor) -> Tensor:
        """States in the mask's order, from raster order. A square grid's transposition is its own inverse."""
        if not self.is_transposed:
            return x_BSD
        text_BTD, image_BND = x_BSD.split([self.text_positions, self.grid**2], dim=1)
        transposed_BND = image_BND.unflatten(1, (self.grid, self.grid)).transpose(1, 2).flatten(1, 2)
        return torch.cat([text_BTD, transposed_BND], dim=1)

    def attend(self, q_BKSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        """attended_BKSE, of queries, keys and values in the mask's order."""
        return self.flex(q_BKSE, k_BKSE, v_BKSE, block_mask=self.blocks)


@functools.cache
def sparse_mask(kind: Kind, text_positions: int, grid: int, conv_kernel: int, device: torch.device) -> SparseMask:
    """`mask` in blocks on `device`, made once a process.

    For a GPU the attention is compiled; on a CPU it is slow and has no backward pass: for tests.
    """
    is_transposed = kind == "column"

    def raster(position: Tensor) -> Tensor:
        """The raster position of an image position of the mask's order."""
        return position % grid * grid + position // grid if is_transposed else position

    def allows(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Both orders put what is above a position in its own column before it, so q ≥ k is causal in both.
        distance = raster(q - text_positions) - raster(k - text_positions)
        return (q >= k) & ((k < text_positions) | _is_near(kind, distance, grid, conv_kernel))

    positions = text_positions + grid**2
    blocks = create_block_mask(allows, None, None, positions, positions, device=device, BLOCK_SIZE=BLOCK)
    flex = _compiled_flex() if device.type == "cuda" else cast("Callable[..., Tensor]", flex_attention)
    return SparseMask(blocks, text_positions, grid, is_transposed, flex)


def keep_compiled_forms() -> None:
    """Raises torch's limit of compiled forms of one function, in this process, to `RECOMPILES`."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(RECOMPILES, torch._dynamo.config.recompile_limit)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    keep_compiled_forms()
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def layer_kinds(layers: int, attention: Attention) -> list[Kind]:
    """The kind of each layer. "paper": column where (i − 2) mod 4 = 0 for i = 1 … L, else row; the last layer conv.

    >>> layer_kinds(7, "paper")
    ['row', 'column', 'row', 'row', 'row', 'column', 'conv']
    """
    if attention == "dense":
        return ["dense"] * layers
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers)]
    return [*kinds, "conv"]
