"""The schedules' ends, middles and order."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.schedules import half_cosine, learning_rate, plateau_halvings


def test_the_temperature_of_the_paper_is_halfway_at_half_of_its_steps():
    def tau(step: int) -> float:
        return half_cosine(step, 1.0, 1 / 16, 150_000)

    assert tau(0) == 1.0
    assert tau(75_000) == pytest.approx((1 + 1 / 16) / 2)  # a quarter cosine would be at 0.725
    assert tau(112_500) == pytest.approx(0.1998, abs=1e-4)
    assert tau(150_000) == tau(3_000_000) == 1 / 16


@given(st.integers(1, 500), st.integers(0, 499), st.floats(0, 10), st.floats(0, 10))
def test_a_half_cosine_never_turns_back_and_never_leaves_its_ends(steps: int, step: int, start: float, end: float):
    now, then = half_cosine(step, start, end, steps), half_cosine(step + 1, start, end, steps)
    low, high = min(start, end), max(start, end)
    assert low - 1e-12 <= then <= high + 1e-12
    assert (then - now) * (end - start) >= -1e-12


def test_a_schedule_of_no_steps_is_at_its_end():
    assert half_cosine(0, 0.0, 6.6, 0) == 6.6


@pytest.mark.parametrize("shape", ["half_cosine", "constant", "wsd", "plateau"])
def test_the_learning_rate_is_never_zero_and_peaks_at_the_end_of_its_warm_up(shape):
    rates = [
        learning_rate(s, peak=3e-4, final=3e-6, steps=100, warmup_steps=10, shape=shape, decay_share=0.3)
        for s in range(100)
    ]
    assert rates[0] == pytest.approx(3e-5)
    assert rates[9] == rates[10] == max(rates) == 3e-4
    assert min(rates) > 0
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


def test_wsd_stays_at_its_peak_until_the_decay_and_ends_at_final():
    def rate(step: int) -> float:
        return learning_rate(step, peak=1.0, final=0.1, steps=100, shape="wsd", decay_share=0.2)

    assert [rate(0), rate(80)] == [1.0, 1.0]
    assert rate(90) == pytest.approx(0.55)
    assert rate(100) == rate(101) == pytest.approx(0.1)


def test_the_learning_rate_of_the_published_dvae():
    def rate(step: int) -> float:
        return learning_rate(step, peak=1e-4, final=1.25e-6, steps=1_200_000)

    assert rate(0) == 1e-4
    assert rate(600_000) == pytest.approx((1e-4 + 1.25e-6) / 2)
    assert rate(2_999_999) == 1.25e-6


def test_the_plateaus_of_the_paper_end_at_a_32nd_of_the_peak():
    def rate(step: int, halvings: int) -> float:
        shape = {"peak": 4.5e-4, "final": 1.4e-5, "steps": 430_000, "warmup_steps": 5_000, "shape": "plateau"}
        return learning_rate(step, **shape, halvings=halvings)

    assert rate(0, 0) == pytest.approx(9e-8)
    assert [rate(100_000, n) for n in (0, 1, 2)] == [4.5e-4, 2.25e-4, 1.125e-4]
    assert rate(400_000, 5) == pytest.approx(4.5e-4 / 32)
    assert rate(400_000, 6) == 1.4e-5  # never below the final rate


def test_a_loss_that_falls_is_no_plateau_and_one_that_stands_still_is_one_after_each_patience():
    assert plateau_halvings([float(-n) for n in range(100)], patience=1) == 0  # negative, as a dVAE's
    assert [plateau_halvings([5.0] * n, patience=3) for n in range(9)] == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert plateau_halvings([5.0, 5.1, 4.9, 5.0, 4.8, 5.0], patience=2) == 0  # each is an improvement within two
    assert plateau_halvings([], patience=1) == 0


def test_falling_by_less_than_the_threshold_is_a_plateau_until_it_adds_up():
    slow = [5.0 - 0.04 * n for n in range(9)]
    assert plateau_halvings(slow, patience=2, threshold=0.1) == 3  # two wait, the third is below: 4.88, 4.76
    assert plateau_halvings(slow, patience=3, threshold=0.1) == 0


def test_losses_that_are_no_numbers_improve_nothing():
    assert plateau_halvings([5.0, math.nan, math.inf, math.nan], patience=3) == 1
    assert plateau_halvings([math.nan, math.nan], patience=2) == 1
    with pytest.raises(ValueError, match="at least one"):
        plateau_halvings([1.0], patience=0)


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), max_size=40), st.integers(1, 5), st.floats(0, 1))
def test_a_longer_history_takes_no_halving_back_and_adds_at_most_one(losses, patience, threshold):
    counts = [plateau_halvings(losses[:n], patience, threshold) for n in range(len(losses) + 1)]
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(counts))
    assert counts[-1] <= len(losses) // patience
