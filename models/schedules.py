"""Numbers that change with the step: β, τ and the learning rate (paper, App. A.2 and B.2). Pure functions
of the step and, for the paper's plateaus, of the losses so far: a run that goes on reads them from its metrics.

"Cosine" is read as *half* a cosine: half of the way is done at half of the steps. Several re-implementations use a
quarter, 1 − cos(s·π/2), which is late by a third of the way in the middle; the difference matters for τ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Shape = Literal["half_cosine", "constant", "wsd", "plateau"]


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
    halvings: int = 0,
) -> float:
    """The learning rate of update `step` (0-based) of `steps`.

    First `warmup_steps` updates rise linearly, the last of them at `peak`. Then, by `shape`:
    "half_cosine" falls to `final` at the end of the run; "constant" stays at `peak`; "wsd" (warm-up, stable, decay)
    stays at `peak` and falls linearly to `final` over the last `decay_share` of the run; "plateau" is `peak` halved
    `halvings` times (see `plateau_halvings`), and never below `final`.

    >>> [round(learning_rate(s, peak=1.0, final=0.0, steps=6, warmup_steps=2), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    >>> [round(learning_rate(s, peak=1.0, final=0.0, steps=10, shape="wsd", decay_share=0.4), 2) for s in (5, 6, 8, 10)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    if shape == "plateau":
        return max(final, peak * 0.5**halvings)
    if shape == "half_cosine":
        return half_cosine(step - warmup_steps, peak, final, steps - warmup_steps)
    decay_steps = max(1, round(decay_share * steps))
    done = min(1.0, max(0.0, (step - (steps - decay_steps)) / decay_steps))
    return peak + (final - peak) * done


def plateau_halvings(losses: Sequence[float], patience: int = 3, threshold: float = 0.0) -> int:
    """How often the rate has been halved by now, from the mean training loss of each interval so far.

    The paper halved its rate whenever the training loss seemed to stand still (App. B.2), five times. Here it is halved
    when `patience` intervals in a row have not been below the best loss before them by more than `threshold`
    (of the loss's own unit, since a dVAE's loss may be negative); then counting starts anew, with the same best.
    A loss that is not a number is no improvement. A longer history never takes a halving back.

    >>> plateau_halvings([3.0, 2.0, 2.1, 2.2], patience=2)
    1
    >>> [plateau_halvings([3.0, 2.0, 1.99, 1.98, 1.97][:n], patience=2, threshold=0.1) for n in range(6)]
    [0, 0, 0, 0, 1, 1]
    """
    if patience < 1:
        raise ValueError(f"patience {patience}: a plateau is at least one interval long")
    halvings, waited, best = 0, 0, math.inf
    for loss in losses:
        waited = 0 if loss < best - threshold else waited + 1
        best = loss if waited == 0 else best
        if waited == patience:
            halvings, waited = halvings + 1, 0
    return halvings
