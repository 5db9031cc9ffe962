from __future__ import annotations

import math

import pytest
import torch

from models.transformer import TransformerSettings
from tests.bench.train import check, sides_of

TINY = TransformerSettings(
    text_positions=8, text_vocabulary=300, grid=3, image_vocabulary=40, width=32, layers=3, heads=2
)


@pytest.mark.slow
def test_every_side_scores_the_tokens_and_learns_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOGPT", raising=False)
    sides = sides_of(TINY, 2, "cpu")
    assert set(sides) >= {"ours"}
    for step in sides.values():
        first, again = step(), step()
        assert torch.equal(first, again)  # gradients start anew, weights stay
        assert not first.requires_grad
    check({name: float(step()) for name, step in sides.items()}, TINY)


def test_a_side_that_scores_something_else_is_found() -> None:
    ours = (7 * math.log(300) + 9 * math.log(40)) / 16
    check({"ours": ours, "nanogpt": math.log(340)}, TINY)
    with pytest.raises(AssertionError, match="nanogpt pays 3"):
        check({"ours": ours, "nanogpt": math.log(40)}, TINY)
