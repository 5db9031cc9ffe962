"""Codes of a picture from a caption, one at a time (paper, §2.6). The transformer's cache is filled here, once.

The paper samples at temperature 1 and picks the best of many; top-k, top-p and guidance are later inventions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from models.text import empty_caption
from models.transformer import Cache, Transformer


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class SampleSettings:
    """How a code is drawn from the model's logits."""

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Divides the logits; 1 in the paper, 0 takes the most probable code."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among the k most probable codes; 0: among all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw among the fewest codes that hold this share of the probability; 1: among all."""
    guidance: Annotated[float, Field(ge=0.0)] = 0.0
    """Scale g of classifier-free guidance: logits + g·(logits − logits for the caption ""). Needs a model trained with
    dropped captions."""


@torch.no_grad()
def sample(model: Transformer, text_BT: Tensor, settings: SampleSettings, seeds_B: Sequence[int]) -> Tensor:
    """codes_BN drawn for each caption, with a cache of keys and values and no wait for the device within the loop.

    Row b draws from a generator of its own, seeded with seeds_B[b]: it does not depend on what its neighbours draw.
    With guidance, the caption "" runs beside each caption in the same batch.
    """
    B, N = len(text_BT), model.settings.image_positions
    uniform_BN = torch.stack([_uniform(seed, N) for seed in seeds_B]).to(text_BT.device)
    if len(uniform_BN) != B:
        raise ValueError(f"{len(seeds_B)} seeds for {B} captions")
    is_guided = settings.guidance > 0.0
    if is_guided:
        text_BT = torch.cat([text_BT, empty_caption(text_BT.shape[1]).to(text_BT).expand_as(text_BT)])
    cache = Cache(model, len(text_BT))
    logits_BV = model.prefill(text_BT, cache)
    codes_BN = torch.empty(B, N, dtype=torch.int64, device=text_BT.device)
    for n in range(N):
        if is_guided:
            right_BV, empty_BV = logits_BV.chunk(2)
            logits_BV = right_BV + settings.guidance * (right_BV - empty_BV)
        codes_B = draw(logits_BV, settings, uniform_BN[:, n])
        codes_BN[:, n] = codes_B
        if n + 1 < N:
            logits_BV = model.step(codes_B.repeat(2) if is_guided else codes_B, n, cache)
    return codes_BN


def _uniform(seed: int, count: int) -> Tensor:
    """Drawn on the CPU for every device: one number a code, and the same picture's numbers everywhere."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(logits_BV: Tensor, settings: SampleSettings, uniform_B: Tensor) -> Tensor:
    """codes_B by inversion: the first code whose cumulated probability exceeds its row's uniform number in [0, 1).

    >>> logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(3, 3)
    >>> draw(logits, SampleSettings(), torch.tensor([0.4, 0.6, 0.9])).tolist()
    [0, 1, 2]
    >>> draw(logits, SampleSettings(top_k=2), torch.tensor([0.4, 0.7, 0.9])).tolist()
    [0, 1, 1]
    """
    if settings.temperature == 0.0:
        return logits_BV.argmax(dim=1)
    if settings.top_k:
        # By logit, not by probability: two logits may differ where their probabilities round to one number.
        kth_B1 = logits_BV.topk(min(settings.top_k, logits_BV.shape[1]), dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    weights_BV = torch.softmax(logits_BV.double() / settings.temperature, dim=1)
    if settings.top_p < 1.0:
        weights_BV = _nucleus(weights_BV, settings.top_p)
    cumulated_BV = weights_BV.cumsum(dim=1)
    # Strictly below the last sum, so that rounding can't run past the last code of weight > 0.
    threshold_B1 = (uniform_B[:, None] * cumulated_BV[:, -1:]).clamp(max=cumulated_BV[:, -1:] * (1.0 - 1e-12))
    return torch.searchsorted(cumulated_BV, threshold_B1, right=True)[:, 0]


def _nucleus(weights_BV: Tensor, top_p: float) -> Tensor:
    """Keeps each row's largest weights until their sum reaches top_p of the row's; the largest is always kept."""
    sorted_BV, order_BV = weights_BV.sort(dim=1, descending=True)
    before_BV = sorted_BV.cumsum(dim=1) - sorted_BV
    is_dropped_BV = before_BV >= top_p * weights_BV.sum(dim=1, keepdim=True)
    return weights_BV.masked_fill(is_dropped_BV.scatter(1, order_BV, is_dropped_BV), 0.0)
