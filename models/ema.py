"""The average of a model's weights over its updates (paper, App. A.2 and B.2), which is what is evaluated and kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """An exponential moving average of weights: after each averaging, w̄ ← d·w̄ + (1 − d)·w.

    `averages` has the names and shapes of the `weights` that it is made with: a whole model's, or one rank's share of
    each, since the average of a share is the share of the average. The dVAE of the paper has decay 0.999 every step,
    its transformer 0.99 every 25 steps. With `warmup`, averaging number t (0-based) uses d = min(decay, (1+t)/(10+t)):
    a short run is not dominated by its random start.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, every: int = 1, warmup: bool = False) -> None:
        """Starts as a copy of `weights`; `every` is the number of updates from one averaging to the next."""
        self.decay, self.every, self.warmup = decay, every, warmup
        self.averagings = 0
        self._weights = dict(weights)
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after the optimizer's update number `step` (0-based); averages after every `every`-th."""
        if (step + 1) % self.every:
            return
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.averagings) / (10 + self.averagings))
        torch._foreach_lerp_(list(self.averages.values()), list(self._weights.values()), 1.0 - decay)
        self.averagings += 1
