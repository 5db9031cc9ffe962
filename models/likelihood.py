"""How likely a picture is under the decoder's statistics: the logit-Laplace (paper, App. A.3). No network lives here.

A pixel x in [0, 1] is first mapped away from the ends, φ(x) = (1 − 2ε)x + ε, so that logit φ(x) is finite. Then
logit φ(x) is Laplace(μ, b):

    f(y | μ, b) = exp(−|logit y − μ| / b) / (2b · y(1 − y)),        y = φ(x)

Training uses this density. It is no bit count for 8-bit pixels: as b → 0 it grows without end while the pixels stay
256 levels. Bits are therefore counted with the *discretised* form: the CDF's difference over each level's bin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 0.1
"""ε of φ, paper App. A.3: keeps pixels in (0.1, 0.9)."""

LEVELS = 256


def map_pixels(images: Tensor) -> Tensor:
    """φ: [0, 1] → [ε, 1 − ε]."""
    return (1.0 - 2.0 * EPSILON) * images + EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """φ⁻¹, clamped to [0, 1].

    >>> x = torch.linspace(0, 1, 5)
    >>> bool(torch.allclose(unmap_pixels(map_pixels(x)), x))
    True
    """
    return ((mapped - EPSILON) / (1.0 - 2.0 * EPSILON)).clamp(0.0, 1.0)


def logit_laplace_nats(images: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """−ln f(φ(x) | μ, b), element by element, in nats; may be negative, for it is a density.

    Args: `images` in [0, 1], `mu` and `ln_b`, all of one shape. The density is that of φ(x), as in the paper; the
    density of x itself is (1 − 2ε) times as large.
    """
    mapped = map_pixels(images)
    ln_mapped, ln_rest = mapped.log(), torch.log1p(-mapped)
    distance = (ln_mapped - ln_rest - mu).abs()
    return distance * torch.exp(-ln_b) + ln_b + math.log(2.0) + ln_mapped + ln_rest


def discretised_logit_laplace_nats(images: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """−ln P(level of x | μ, b), element by element, in nats; divide by ln 2 for bits. Never negative.

    Level k of 0 … 255 owns the pixels within half a level of k/255; the first bin reaches down to φ⁻¹(0) and the last
    up to φ⁻¹(1), so that the 256 masses sum to 1. `images` in [0, 1] are rounded to the nearest level.

    With u, v = (logit of the bin's lower and upper edge − μ)/b, the mass is F(v) − F(u) for the standard Laplace CDF F.
    It is computed from the side of the tail the bin lies in, so that it never cancels:

        v ≤ 0:       ½ eᵛ (1 − e^(u−v))
        u ≥ 0:       ½ e⁻ᵘ (1 − e^(u−v))
        u < 0 < v:   ½ (1 − eᵘ) + ½ (1 − e⁻ᵛ)
    """
    levels = (images * (LEVELS - 1)).round().long()
    edges = _bin_edges(images.device)
    lower, upper = edges[levels], edges[levels + 1]
    # Double precision: this is measured, never trained on, and the masses of 256 bins must sum to 1 within 1e-6.
    b = ln_b.double().exp()
    u, v = (lower - mu.double()) / b, (upper - mu.double()) / b
    ln_width_term = torch.log(-torch.expm1((lower - upper) / b))
    in_tail = -torch.maximum(-v, u) + ln_width_term
    across = torch.log(-torch.expm1(u.clamp(max=0.0)) - torch.expm1(-v.clamp(min=0.0)))
    ln_mass = torch.where((u < 0) & (v > 0), across, in_tail) - math.log(2.0)
    return -ln_mass.to(mu.dtype)


def _bin_edges(device: torch.device) -> Tensor:
    """logit φ of the 257 edges of the levels' bins, −∞ and ∞ at the ends, in double precision."""
    middles = (torch.arange(LEVELS - 1, dtype=torch.float64, device=device) + 0.5) / (LEVELS - 1)
    end = middles.new_full((1,), math.inf)
    return torch.cat([-end, torch.logit(map_pixels(middles)), end])
