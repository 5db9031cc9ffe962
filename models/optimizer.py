"""Which weights decay. The optimizers themselves are torch's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices and convolution kernels decay; biases and gains (one axis) do not.

    The paper gives the decay (4.5e-2, App. B.2) and not which weights it is for; this is GPT's rule.

    >>> from torch import nn
    >>> network = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    >>> [len(group["params"]) for group in parameter_groups(network.parameters(), 0.1)]
    [1, 3]
    """
    given = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in given if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in given if p.dim() < 2], "weight_decay": 0.0},
    ]
