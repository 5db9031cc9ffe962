"""The logit-Laplace is a density, its discretised form a distribution over 256 levels."""

from __future__ import annotations

import math

import pytest
import torch

from models.likelihood import (
    EPSILON,
    discretised_logit_laplace_nats,
    logit_laplace_nats,
    map_pixels,
    unmap_pixels,
)

ALL_LEVELS = torch.arange(256) / 255
CASES = [(mu, ln_b) for mu in (-3.0, -0.41, 0.0, 0.013, 2.0, 9.0) for ln_b in (-7.0, -3.0, -1.5, 0.0, 2.0)]


def statistics(mu: float, ln_b: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((256,), mu), torch.full((256,), ln_b)


def test_pixels_are_mapped_into_the_open_interval_and_back():
    mapped = map_pixels(ALL_LEVELS)
    assert float(mapped.min()) == pytest.approx(EPSILON)
    assert float(mapped.max()) == pytest.approx(1 - EPSILON)
    assert torch.allclose(unmap_pixels(mapped), ALL_LEVELS, atol=1e-6)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]  # what lies outside is clamped


@pytest.mark.parametrize(("mu", "ln_b"), [(0.0, -1.0), (1.5, 0.0), (-2.0, -2.0), (0.3, 1.0)])
def test_the_density_integrates_to_one(mu: float, ln_b: float):
    # Over all mapped values y in (0, 1), by the substitution y = sigmoid(t): dy = y(1 - y) dt.
    t = torch.linspace(-60, 60, 600_001, dtype=torch.float64)
    y = torch.sigmoid(t)
    images = (y - EPSILON) / (1 - 2 * EPSILON)
    nats = logit_laplace_nats(images, torch.full_like(t, mu), torch.full_like(t, ln_b))
    integrand = torch.exp(-nats) * y * (1 - y)
    assert float(torch.trapezoid(integrand[y.gt(1e-12) & y.lt(1 - 1e-12)], dx=120 / 600_000)) == pytest.approx(
        1, abs=1e-4
    )


def test_the_density_is_the_formula_of_the_paper():
    x, mu, ln_b = torch.tensor([0.2]), torch.tensor([0.7]), torch.tensor([-1.1])
    y, b = 0.8 * 0.2 + 0.1, math.exp(-1.1)
    expected = math.exp(-abs(math.log(y / (1 - y)) - 0.7) / b) / (2 * b * y * (1 - y))
    assert float(logit_laplace_nats(x, mu, ln_b)) == pytest.approx(-math.log(expected), rel=1e-5)


@pytest.mark.parametrize(("mu", "ln_b"), CASES)
def test_the_masses_of_the_256_levels_sum_to_one(mu: float, ln_b: float):
    nats = discretised_logit_laplace_nats(ALL_LEVELS.double(), *(s.double() for s in statistics(mu, ln_b)))
    assert float(torch.exp(-nats).sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("mu", "ln_b"), CASES)
def test_in_single_precision_too(mu: float, ln_b: float):
    nats = discretised_logit_laplace_nats(ALL_LEVELS, *statistics(mu, ln_b))
    assert nats.dtype == torch.float32
    assert bool((nats >= 0).all())
    assert bool(nats.isfinite().all())  # a level however far away still has a cost
    assert float(torch.exp(-nats).sum()) == pytest.approx(1.0, abs=1e-6)


def test_a_bin_s_mass_is_the_difference_of_the_cumulative_distribution():
    mu, b = 0.4, 0.3

    def cdf(x: float) -> float:
        y = 0.8 * x + 0.1
        z = (math.log(y / (1 - y)) - mu) / b
        return 0.5 * math.exp(z) if z < 0 else 1 - 0.5 * math.exp(-z)

    for level in (1, 80, 135, 160, 254):
        expected = cdf((level + 0.5) / 255) - cdf((level - 0.5) / 255)
        nats = discretised_logit_laplace_nats(
            torch.tensor([level / 255]), torch.tensor([mu]), torch.tensor([math.log(b)])
        )
        assert math.exp(-float(nats)) == pytest.approx(expected, rel=1e-4)


def test_wide_distributions_cost_the_density_plus_the_bits_of_one_level():
    statistics_0 = statistics(0.0, 0.0)
    inner = slice(1, 255)
    difference_nats = (
        discretised_logit_laplace_nats(ALL_LEVELS, *statistics_0) - logit_laplace_nats(ALL_LEVELS, *statistics_0)
    )[inner]
    assert torch.allclose(difference_nats / math.log(2), torch.full((254,), math.log2(255 / 0.8)), atol=0.01)  # 8.316


def test_the_density_falls_below_zero_where_bits_do_not():
    # The trap: at small b the density promises less than nothing for pixels that are 256 levels.
    x = torch.tensor([128 / 255])
    mu, ln_b = torch.logit(map_pixels(x)), torch.tensor([-7.0])
    assert float(logit_laplace_nats(x, mu, ln_b)) < -3
    assert 0 <= float(discretised_logit_laplace_nats(x, mu, ln_b)) < 0.01


def test_the_most_likely_b_is_the_mean_distance():
    # d/db of |d|/b + ln b is zero at b = mean |d|: the gradient that training follows points there.
    x = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mu = torch.zeros_like(x)
    distance = torch.logit(map_pixels(x)).abs().mean()
    ln_b = distance.log().clone().requires_grad_()
    logit_laplace_nats(x, mu, ln_b.expand_as(x)).sum().backward()
    assert abs(float(ln_b.grad)) < 1e-9
