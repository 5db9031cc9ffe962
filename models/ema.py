"""The average of a model's weights over its updates (paper, App. A.2 and B.2), which is what is evaluated and kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """An exponential moving average of `model`'s weights: after each averaging, w̄ ← d·w̄ + (1 − d)·w.

    `module` is the averaged copy: frozen, in eval mode, ready to be called. The dVAE of the paper has decay 0.999
    every step, its transformer 0.99 every 25 steps. With `warmup`, averaging number t (0-based) uses
    d = min(decay, (1+t)/(10+t)): a short run is not dominated by its random start.

    Give it the model itself, not a DDP wrapper.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1, warmup: bool = False) -> None:
        """Starts as a copy of `model`; `every` is the number of updates from one averaging to the next."""
        self.decay, self.every, self.warmup = decay, every, warmup
        self.averagings = 0
        self._model = model
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after the optimizer's update number `step` (0-based); averages after every `every`-th."""
        if (step + 1) % self.every:
            return
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.averagings) / (10 + self.averagings))
        averages, weights = self.module.state_dict(), self._model.state_dict()
        floating = [name for name, value in averages.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[name] for name in floating], [weights[name] for name in floating], 1.0 - decay)
        for name in averages.keys() - set(floating):
            averages[name].copy_(weights[name])
        self.averagings += 1

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs: the averaged weights and the number of averagings."""
        weights: dict[str, Tensor] = self.module.state_dict()
        return {"averagings": self.averagings, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.averagings = int(state["averagings"])
        self.module.load_state_dict(state["weights"])
