"""The average is the formula's, and a resume goes on with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.ema import Ema


def _weights(value: float) -> dict[str, Tensor]:
    return {"weight": torch.tensor([value], requires_grad=True)}


def _become(weights: dict[str, Tensor], value: float) -> None:
    with torch.no_grad():
        weights["weight"].fill_(value)


def test_the_average_follows_the_recursion():
    weights = _weights(0.0)
    ema = Ema(weights, decay=0.9)
    expected = 0.0
    for step in range(5):
        _become(weights, float(step + 1))
        ema.update(step)
        expected = 0.9 * expected + 0.1 * (step + 1)
        assert ema.averages["weight"].item() == pytest.approx(expected)


def test_with_warm_up_the_start_is_soon_forgotten():
    weights = _weights(100.0)
    ema = Ema(weights, decay=0.999, warmup=True)
    _become(weights, 0.0)
    for step in range(20):
        ema.update(step)
    expected = 100.0
    for t in range(20):
        expected *= min(0.999, (1 + t) / (10 + t))
    assert ema.averages["weight"].item() == pytest.approx(expected, rel=1e-4)
    assert ema.averages["weight"].item() < 1e-3 < 100 * 0.999**20


def test_the_paper_s_transformer_is_averaged_every_25_updates():
    weights = _weights(0.0)
    ema = Ema(weights, decay=0.99, every=25)
    _become(weights, 1.0)
    seen = []
    for step in range(75):
        ema.update(step)
        seen.append(ema.averagings)
    assert seen[23:26] == [0, 1, 1]
    assert seen[-1] == 3
    assert ema.averages["weight"].item() == pytest.approx(1 - 0.99**3, rel=1e-4)


def test_the_average_is_frozen_and_apart_from_the_weights():
    weights = _weights(1.0)
    ema = Ema(weights, decay=0.5)
    _become(weights, 2.0)
    assert ema.averages["weight"].item() == 1.0
    assert not ema.averages["weight"].requires_grad


def test_the_averages_of_two_shares_are_the_shares_of_the_average():
    whole = {"w": torch.arange(6.0).view(3, 2)}
    shares = [{"w": whole["w"][:2]}, {"w": whole["w"][2:]}]
    emas = [Ema(weights, decay=0.7) for weights in (whole, *shares)]
    whole["w"].mul_(3.0)
    for ema in emas:
        ema.update(0)
    assert torch.equal(emas[0].averages["w"], torch.cat([emas[1].averages["w"], emas[2].averages["w"]]))
