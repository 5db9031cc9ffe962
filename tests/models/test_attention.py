"""The masks: causal, all text visible, the densities and windows of the paper, and every earlier position reachable."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from models.attention import Kind, layer_kinds, mask

KINDS: list[Kind] = ["dense", "row", "column", "conv"]
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
