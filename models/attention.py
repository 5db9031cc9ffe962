"""Which position may attend to which (paper, §2.2, App. B.1, Fig. 11). Boolean masks only; no weights live here.

Text is causal; every image position sees all text. Among image positions (raster order, G a row), n sees m ≤ n if

    dense    always
    row      n − m ≤ G: itself and the G before it. A window of raster order, not "its own row"
    column   (n − m) mod G = 0: the same column, itself and above
    conv     n − m = r·G + c with 0 ≤ r ≤ k/2, |c| ≤ k/2: a k×k window, its causal half; it wraps around at the ends of
             rows, since only the distance in raster order counts

In raster order a block-sparse kernel gains nothing from the column mask; on transposed image states it does.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["dense", "row", "column", "conv"]
Attention = Literal["paper", "dense"]


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
    if kind == "dense":
        return torch.ones_like(distance, dtype=torch.bool)
    if kind == "row":
        return distance <= grid
    if kind == "column":
        return distance % grid == 0
    reach = conv_kernel // 2
    steps = torch.arange(reach + 1, device="cpu")[:, None] * grid + torch.arange(-reach, reach + 1, device="cpu")
    return torch.isin(distance, steps)


def layer_kinds(layers: int, attention: Attention) -> list[Kind]:
    """The kind of each layer. "paper": column where (i − 2) mod 4 = 0 for i = 1 … L, else row; the last layer conv.

    >>> layer_kinds(7, "paper")
    ['row', 'column', 'row', 'row', 'row', 'column', 'conv']
    """
    if attention == "dense":
        return ["dense"] * layers
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers)]
    return [*kinds, "conv"]
