"""Numbers that change with the step: β, τ and the learning rate (paper, App. A.2 and B.2). Pure functions of the step.

"Cosine" is read as *half* a cosine: half of the way is done at half of the steps. Several re-implementations use a
quarter, 1 − cos(s·π/2), which is late by a third of the way in the middle; the difference matters for τ.
"""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["half_cosine", "constant", "wsd"]


def half_cosine(step: int, start: float, end: float, steps: int) -> float:
    """`start` at step 0, `end` from step `steps` on: end + (start − end)·(1 + cos πs)/2 with s = step/steps.

    >>> [round(half_cosine(step, 1.0, 0.0, 4), 3) for step in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    if step >= steps:
        return end
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def learning_rate(
    step: int,
    *,
    peak: float,
    final: float,
    steps: int,
    warmup_steps: int = 0,
    shape: Shape = "half_cosine",
    decay_share: float = 0.2,
) -> float:
    """The learning rate of update `step` (0-based) of `steps`.

    First `warmup_steps` updates rise linearly, the last of them at `peak`. Then, by `shape`:
    "half_cosine" falls to `final` at the end of the run; "constant" stays at `peak`; "wsd" (warm-up, stable, decay)
    stays at `peak` and falls linearly to `final` over the last `decay_share` of the run.

    >>> [round(learning_rate(s, peak=1.0, final=0.0, steps=6, warmup_steps=2), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    >>> [round(learning_rate(s, peak=1.0, final=0.0, steps=10, shape="wsd", decay_share=0.4), 2) for s in (5, 6, 8, 10)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    if shape == "half_cosine":
        return half_cosine(step - warmup_steps, peak, final, steps - warmup_steps)
    decay_steps = max(1, round(decay_share * steps))
    done = min(1.0, max(0.0, (step - (steps - decay_steps)) / decay_steps))
    return peak + (final - peak) * done
