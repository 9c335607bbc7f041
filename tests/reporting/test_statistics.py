"""Means, intervals and paired differences: against arithmetic by hand, and what must hold for any numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.reporting.statistics import DRAWS, band, bootstrap, estimate, paired, student, verdict, width_beside_student

NUMBERS = st.floats(-1e3, 1e3, allow_nan=False)
SEEDS = st.dictionaries(st.integers(0, 50), NUMBERS, min_size=2, max_size=12)


def test_three_values_by_hand() -> None:
    """Of 27 equally likely draws one is 1,1,1 and one is 3,3,3, 3.7 % each: more than 2.5 %, so that the interval reaches from 1 to 3."""
    one = estimate({0: 1.0, 1: 2.0, 2: 3.0})
    assert (one.n, one.mean, one.sd) == (3, 2.0, 1.0)
    assert (one.low, one.high) == (1.0, 3.0)
    half = 4.303 * 1.0 / math.sqrt(3)
    assert (one.student_low, one.student_high) == pytest.approx((2 - half, 2 + half))
    assert one.too_narrow and one.excludes_zero and not one.excludes_zero_by_student


def test_two_values_reach_from_one_to_the_other() -> None:
    """A quarter of the draws are all of the one."""
    assert bootstrap([5.0, 7.0]) == (5.0, 7.0)


def test_one_value_has_no_interval_and_none_has_nothing() -> None:
    one, none = estimate({3: 1.5}), estimate({})
    assert one.mean == 1.5 and all(map(math.isnan, (one.sd, one.low, one.high, one.student_low, one.student_high)))
    assert none.n == 0 and math.isnan(none.mean)
    assert not one.excludes_zero and not one.excludes_zero_by_student and not one.too_narrow


def test_differences_are_of_the_same_seed() -> None:
    assert paired({0: 5.0, 1: 7.0, 2: 9.0}, {1: 6.0, 2: 10.0, 3: 0.0}) == {1: 1.0, 2: -1.0}


def test_the_draws_are_those_of_a_fixed_generator() -> None:
    values = np.random.default_rng(1).normal(size=7)
    means = np.random.default_rng(0).choice(values, size=(DRAWS, 7)).mean(axis=1)
    assert bootstrap(values.tolist()) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_how_wide_the_interval_is_beside_students() -> None:
    assert [round(width_beside_student(n), 2) for n in (3, 5, 10)] == [0.37, 0.63, 0.82]
    values = np.random.default_rng(2).normal(size=10).tolist()
    (low, high), (student_low, student_high) = bootstrap(values), student(values)
    assert (high - low) / (student_high - student_low) == pytest.approx(width_beside_student(10), rel=0.1)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_mean_lies_in_its_interval_and_the_interval_in_the_values(values: dict[int, float]) -> None:
    one, room = estimate(values), 1e-9 * (1 + max(map(abs, values.values())))
    assert min(values.values()) - room <= one.low <= one.mean + room
    assert one.mean - room <= one.high <= max(values.values()) + room
    assert one.student_low <= one.mean <= one.student_high


@given(SEEDS, NUMBERS, st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_an_interval_moves_and_grows_with_its_values(values: dict[int, float], shift: float, scale: float) -> None:
    one, other = estimate(values), estimate({seed: scale * value + shift for seed, value in values.items()})
    assert (other.low, other.high) == pytest.approx((scale * one.low + shift, scale * one.high + shift), abs=1e-6)


@given(SEEDS, SEEDS)
@settings(max_examples=40, deadline=None)
def test_pairing_turns_around(mine: dict[int, float], base: dict[int, float]) -> None:
    there, back = paired(mine, base), paired(base, mine)
    assert set(there) == set(mine) & set(base)
    assert all(there[seed] == -back[seed] for seed in there)


@given(SEEDS, NUMBERS)
@settings(max_examples=30, deadline=None)
def test_what_both_share_is_not_in_the_difference(values: dict[int, float], shift: float) -> None:
    """However far seeds lie apart, a constant difference has no spread."""
    one = estimate(paired({seed: value + shift for seed, value in values.items()}, values))
    assert (one.low, one.high) == pytest.approx((shift, shift), abs=1e-9)


def test_verdicts() -> None:
    assert verdict(0.1, 0.2) == "helps" and verdict(-0.2, -0.1) == "hurts"
    assert verdict(0.1, 0.2, lower_is_better=True) == "hurts" and verdict(-0.2, -0.1, lower_is_better=True) == "helps"
    assert verdict(-0.1, 0.1) == verdict(0.0, 0.1) == "no difference seen"
    assert verdict(math.nan, math.nan) == "too few seeds"


def test_a_band_is_a_mean_and_an_interval_at_every_point() -> None:
    values = np.array([[1.0, 2.0, math.nan], [3.0, math.nan, math.nan], [5.0, 4.0, 7.0]])
    mean, low, high = band(values)
    assert mean.tolist() == [3.0, 3.0, 7.0]
    assert (low[0], high[0]) == (1.0, 5.0) and (low[1], high[1]) == (2.0, 4.0)
    assert math.isnan(low[2]) and math.isnan(high[2])
