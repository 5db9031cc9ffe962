"""The masks: causal, all text visible, the densities and windows of the paper, every earlier position reachable; and in
blocks the same, with less work for columns on transposed states."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from models.attention import BLOCK, Kind, SparseMask, layer_kinds, mask, sparse_mask

KINDS: list[Kind] = ["dense", "row", "column", "conv"]
CPU = torch.device("cpu")
sizes = {
    "kind": st.sampled_from(KINDS),
    "text": st.integers(1, 20),
    "grid": st.integers(1, 9),
    "kernel": st.sampled_from([1, 3, 5, 11]),
}
SIZES = [(256, 32), (16, 8), (2, 3), (1, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "grid"), SIZES)
def test_nothing_attends_to_what_comes_later_and_everything_to_itself(kind: Kind, text: int, grid: int):
    mask_SS = mask(kind, text, grid)
    assert mask_SS.shape == (text + grid**2,) * 2
    assert mask_SS.dtype == torch.bool
    assert not mask_SS.triu(1).any()
    assert mask_SS.diagonal().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "grid"), SIZES)
def test_text_is_causal_and_every_image_position_sees_all_of_it(kind: Kind, text: int, grid: int):
    mask_SS = mask(kind, text, grid)
    assert torch.equal(mask_SS[:text, :text], torch.ones(text, text, dtype=torch.bool).tril())
    assert mask_SS[text:, :text].all()


@settings(deadline=None)
@given(**sizes)
def test_at_any_size_masks_are_causal_and_show_all_text(kind: Kind, text: int, grid: int, kernel: int):
    mask_SS = mask(kind, text, grid, kernel)
    assert not mask_SS.triu(1).any()
    assert mask_SS.diagonal().all()
    assert mask_SS[text:, :text].all()
    assert torch.equal(mask_SS[:text], mask("dense", text, grid)[:text])


@settings(deadline=None)
@given(grid=st.integers(1, 12), kernel=st.sampled_from([1, 3, 5, 11]))
def test_at_any_size_row_column_row_reaches_every_earlier_position(grid: int, kernel: int):
    row, column = (mask(kind, 1, grid, kernel)[1:, 1:].float() for kind in ("row", "column"))
    assert torch.equal((row @ column @ row) > 0, torch.ones(grid**2, grid**2).tril() > 0)


@settings(deadline=None)
@given(grid=st.integers(1, 9), kernel=st.sampled_from([1, 3, 5, 11]))
def test_the_window_holds_the_distances_of_its_definition(grid: int, kernel: int):
    reach = kernel // 2
    window = {r * grid + c for r in range(reach + 1) for c in range(-reach, reach + 1)}
    expected = [[q >= k and q - k in window for k in range(grid**2)] for q in range(grid**2)]
    assert mask("conv", 1, grid, kernel)[1:, 1:].tolist() == expected


@pytest.mark.parametrize(
    ("kind", "density", "keys"),
    [("dense", 1.0, 768), ("row", 0.400, 288), ("column", 0.380, 272), ("conv", 0.430, 312)],
)
def test_the_published_size_has_the_densities_of_the_table(kind: Kind, density: float, keys: int):
    mask_SS = mask(kind, 256, 32)
    assert mask_SS.sum().item() / (1280 * 1281 / 2) == pytest.approx(density, abs=5e-4)
    assert mask_SS[256:].sum(dim=1).double().mean().item() == pytest.approx(keys, abs=0.6)


def seen(kind: Kind, grid: int, query: tuple[int, int], kernel: int = 11) -> set[tuple[int, int]]:
    """The (row, column) cells that the query's cell attends to."""
    mask_NN = mask(kind, 1, grid, kernel)[1:, 1:]
    keys = mask_NN[query[0] * grid + query[1]].nonzero()[:, 0].tolist()
    return {divmod(key, grid) for key in keys}


def test_a_row_layer_sees_itself_and_a_grid_s_width_back():
    # 33 keys on a grid 32 wide: back to the cell just above, and not "its own row".
    assert len(seen("row", 32, (9, 4))) == 33
    assert seen("row", 4, (2, 1)) == {(1, 1), (1, 2), (1, 3), (2, 0), (2, 1)}


def test_a_column_layer_sees_the_cells_above():
    assert seen("column", 4, (2, 1)) == {(0, 1), (1, 1), (2, 1)}


def test_a_convolutional_layer_sees_the_causal_half_of_its_window():
    expected = {(row, column) for row in range(4, 9) for column in range(11, 22)} | {(9, c) for c in range(11, 17)}
    assert seen("conv", 32, (9, 16)) == expected
    assert len(expected) == 61


def test_the_window_wraps_around_at_the_ends_of_rows():
    # Column 0: what lies left of it is the end of the row above.
    assert seen("conv", 8, (3, 0), kernel=3) == {(3, 0), (2, 7), (2, 0), (2, 1), (1, 7)}


def test_row_column_row_reaches_every_earlier_position():
    for grid in (4, 8, 32):
        row, column = (mask(kind, 1, grid)[1:, 1:].float() for kind in ("row", "column"))
        reached = (row @ column @ row) > 0
        assert torch.equal(reached, mask("dense", 1, grid)[1:, 1:])
        # One row layer and one column layer do already, in either order; two of one kind do not.
        assert torch.equal((row @ column) > 0, reached)
        assert torch.equal((column @ row) > 0, reached)
        assert not torch.equal((column @ column) > 0, reached)
        assert not torch.equal((row @ row) > 0, reached)


# In blocks --------------------------------------------------------------------------------------------------------


def pairs_of(masked: SparseMask, positions: int) -> torch.Tensor:
    """mask_SS in raster order, of a mask in blocks."""
    place = torch.arange(positions)
    allowed_SS = masked.blocks.mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place[None, :])
    order = masked.arranged(place[None, :, None])[0, :, 0]
    return torch.empty_like(allowed_SS).index_put((order[:, None], order[None, :]), allowed_SS)


@settings(deadline=None)
@given(**sizes)
def test_in_blocks_a_mask_allows_the_same_pairs(kind: Kind, text: int, grid: int, kernel: int):
    masked = sparse_mask(kind, text, grid, kernel, CPU)
    assert torch.equal(pairs_of(masked, text + grid**2), mask(kind, text, grid, kernel))
    assert masked.is_transposed == (kind == "column")


@pytest.mark.parametrize(("kind", "share"), [("dense", 1.0), ("row", 34 / 55), ("column", 27 / 55), ("conv", 40 / 55)])
def test_the_published_size_needs_the_blocks_of_the_table(kind: Kind, share: float):
    # Blocks of 128: 10 a side, 55 on and below the diagonal. Transposed, columns need 0.49 of them.
    blocks = sparse_mask(kind, 256, 32, 11, CPU).blocks
    assert blocks.full_kv_num_blocks is not None
    kept = int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum())
    assert kept / 55 == pytest.approx(share)


def test_in_raster_order_columns_would_need_every_block():
    mask_SS = mask("column", 256, 32)
    blocks = mask_SS.unflatten(0, (10, BLOCK)).unflatten(2, (10, BLOCK)).any(dim=3).any(dim=1)
    assert int(blocks.sum()) == 55


def heads(states_BSD: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values, BKSE, of two heads."""
    return [part.unflatten(2, (2, -1)).transpose(1, 2) for part in states_BSD.chunk(3, dim=2)]


def attended(x_BSD: torch.Tensor, masked: SparseMask) -> torch.Tensor:
    """What a layer does with a mask in blocks."""
    return masked.arranged(masked.attend(*heads(masked.arranged(x_BSD))).transpose(1, 2).flatten(2))


TEXT, GRID = 13, 12  # 157 positions: two blocks, the second one not full


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on a CPU it is for tests
def test_flex_attention_is_masked_attention(kind: Kind):
    x_BSD = torch.randn(2, TEXT + GRID**2, 3 * 16, generator=torch.Generator().manual_seed(0))
    sparse = attended(x_BSD, sparse_mask(kind, TEXT, GRID, 11, CPU))
    dense = F.scaled_dot_product_attention(*heads(x_BSD), attn_mask=mask(kind, TEXT, GRID)).transpose(1, 2).flatten(2)
    assert dense.std() > 0.1
    assert (sparse - dense).abs().max().item() < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, when it imports inductor
@pytest.mark.parametrize("kind", ["column", "conv"])
def test_flex_attention_compiled_is_masked_attention(kind: Kind):
    # As on a GPU, but for the backward pass: the masks' arithmetic goes through the compiler, one form for each batch.
    masked = dataclasses.replace(sparse_mask(kind, TEXT, GRID, 11, CPU), flex=torch.compile(flex_attention))
    for pictures in (2, 1):
        x_BSD = torch.randn(pictures, TEXT + GRID**2, 3 * 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            sparse = attended(x_BSD, masked)
        dense = F.scaled_dot_product_attention(*heads(x_BSD), attn_mask=mask(kind, TEXT, GRID))
        assert (sparse - dense.transpose(1, 2).flatten(2)).abs().max().item() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_a_mask_in_blocks_keeps_the_gradients(kind: Kind):
    # FlexAttention has no backward pass on a CPU: here its pairs in our order, with SDPA; a GPU test has the whole.
    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: BlockMask) -> torch.Tensor:
        pairs = create_mask(block_mask.mask_mod, None, None, q.shape[2], q.shape[2], device="cpu")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs)

    masked = dataclasses.replace(sparse_mask(kind, TEXT, GRID, 11, CPU), flex=sdpa)
    x_BSD = torch.randn(2, TEXT + GRID**2, 3 * 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sparse = attended(x_BSD, masked)
    dense = F.scaled_dot_product_attention(*heads(x_BSD), attn_mask=mask(kind, TEXT, GRID)).transpose(1, 2).flatten(2)
    weights = torch.linspace(-1, 1, dense.numel()).view_as(dense)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), x_BSD)[0] for out in (sparse, dense))
    assert theirs.abs().max().item() > 0.1
    assert (ours - theirs).abs().max().item() < 1e-5


# Layers -----------------------------------------------------------------------------------------------------------


def test_the_published_layers_are_47_rows_16_columns_and_a_last_convolution():
    kinds = layer_kinds(64, "paper")
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"]
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 63, 4))
    assert kinds[-1] == "conv"
    assert Counter(kinds) == {"row": 47, "column": 16, "conv": 1}


def test_a_shallow_model_follows_the_same_rule():
    assert layer_kinds(1, "paper") == ["conv"]
    assert layer_kinds(3, "paper") == ["row", "column", "conv"]
    assert layer_kinds(3, "dense") == ["dense"] * 3
