"""The average is the formula's, and a resume goes on with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.ema import Ema


class Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def become(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.count += 1


def test_the_average_follows_the_recursion():
    model = Scalar(0.0)
    ema = Ema(model, decay=0.9)
    expected = 0.0
    for step in range(5):
        model.become(float(step + 1))
        ema.update(step)
        expected = 0.9 * expected + 0.1 * (step + 1)
        assert ema.module.weight.item() == pytest.approx(expected)
    assert ema.module.count.item() == 5  # what is no average is copied


def test_with_warm_up_the_start_is_soon_forgotten():
    model = Scalar(100.0)
    ema = Ema(model, decay=0.999, warmup=True)
    model.become(0.0)
    for step in range(20):
        ema.update(step)
    expected = 100.0
    for t in range(20):
        expected *= min(0.999, (1 + t) / (10 + t))
    assert ema.module.weight.item() == pytest.approx(expected, rel=1e-4)
    assert ema.module.weight.item() < 1e-3 < 100 * 0.999**20


def test_the_paper_s_transformer_is_averaged_every_25_updates():
    model = Scalar(0.0)
    ema = Ema(model, decay=0.99, every=25)
    model.become(1.0)
    seen = []
    for step in range(75):
        ema.update(step)
        seen.append(ema.averagings)
    assert seen[23:26] == [0, 1, 1]
    assert seen[-1] == 3
    assert ema.module.weight.item() == pytest.approx(1 - 0.99**3, rel=1e-4)


def test_the_average_is_frozen_and_apart_from_the_model():
    model = Scalar(1.0)
    ema = Ema(model, decay=0.5)
    model.become(2.0)
    assert ema.module.weight.item() == 1.0
    assert not ema.module.weight.requires_grad
    assert not ema.module.training


def test_a_resumed_average_equals_one_that_never_stopped():
    model, other = Scalar(3.0), Scalar(-1.0)
    ema = Ema(model, decay=0.9, warmup=True)
    for step in range(4):
        model.become(float(step))
        ema.update(step)
    resumed = Ema(other, decay=0.9, warmup=True)
    resumed.load_state_dict(ema.state_dict())
    for average, weights in ((ema, model), (resumed, other)):
        weights.become(7.0)
        average.update(4)
    assert ema.module.weight.item() == resumed.module.weight.item()
