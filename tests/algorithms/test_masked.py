"""Masked sums and whitening: against loops, over shards, and with poison in the padding."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algorithms.masked import masked_mean, masked_sum, masked_sums, whiten

from .draw import Answers, answers, poisoned


@settings(max_examples=50, deadline=None)
@given(drawn=answers(), poison=st.sampled_from([math.inf, -math.inf, math.nan]))
def test_sums_equal_the_loop(drawn: Answers, poison: float) -> None:
    mask = drawn.action_mask
    x = poisoned(drawn.numbers(), mask, poison)
    chosen = x[mask].tolist()
    assert masked_sum(x, mask).item() == pytest.approx(sum(chosen), abs=1e-5)
    assert masked_mean(x, mask).item() == pytest.approx(sum(chosen) / max(len(chosen), 1), abs=1e-5)
    assert masked_mean(x, mask, denominator=10).item() == pytest.approx(sum(chosen) / 10, abs=1e-5)
    sums = masked_sums(x, mask)
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx([len(chosen), sum(chosen), sum(v * v for v in chosen)])


def test_the_gradient_of_a_masked_sum_stays_inside() -> None:
    x = torch.tensor([1.0, math.inf, math.nan], requires_grad=True)
    masked_mean(x, torch.tensor([True, False, False])).backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0, 0.0]


def test_parts_of_a_step_add_up_to_its_mean() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([5, 1, 0, 2, 3, 4])[:, None]
    parts = sum(masked_mean(x[i : i + 2], mask[i : i + 2], denominator=mask.sum()) for i in range(0, 6, 2))
    torch.testing.assert_close(parts, masked_mean(x, mask))


@settings(max_examples=50, deadline=None)
@given(drawn=answers(min_length=1), shift_mean=st.booleans())
def test_whitened_numbers(drawn: Answers, shift_mean: bool) -> None:
    mask, x = drawn.action_mask, 5 + 3 * drawn.numbers()
    whitened = whiten(poisoned(x, mask, math.nan), mask, masked_sums(x, mask), shift_mean=shift_mean)
    chosen = x[mask].tolist()
    mean, deviation = statistics.fmean(chosen), math.sqrt(statistics.pvariance(chosen) + 1e-8)
    back = 0 if shift_mean else mean
    expected = [(v - mean) / deviation + back for v in chosen]
    # With one number the variance is pure rounding; (v - mean) is then 0 and so is the result.
    assert whitened[mask].tolist() == pytest.approx(expected, abs=1e-4)
    assert whitened.dtype == x.dtype and (whitened[~mask] == 0).all()


@settings(max_examples=50, deadline=None)
@given(drawn=answers(), cut=st.integers(0, 4))
def test_whitening_shards_equals_whitening_the_whole(drawn: Answers, cut: int) -> None:
    mask, x = drawn.action_mask, drawn.numbers()
    shards = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]
    sums = torch.stack([masked_sums(*shard) for shard in shards]).sum(dim=0)
    whole = whiten(x, mask, masked_sums(x, mask))
    torch.testing.assert_close(torch.cat([whiten(*shard, sums) for shard in shards]), whole, atol=1e-6, rtol=1e-6)


def test_nothing_to_whiten() -> None:
    x, mask = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert (whiten(x, mask, masked_sums(x, mask)) == 0).all()
    assert masked_mean(x, mask) == 0
