"""Shaped rewards, GAE and running moments: against loops, closed forms, and with poison in the padding."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algorithms.advantages import RunningMoments, gae, last_true, shape_rewards
from rlhf.algorithms.masked import masked_sums

from . import reference
from .draw import Answers, answers, poisoned

SMALL = settings(max_examples=50, deadline=None)


@SMALL
@given(drawn=answers(), poison=st.sampled_from([math.inf, math.nan]))
def test_shaped_rewards_equal_the_loop(drawn: Answers, poison: float) -> None:
    mask = drawn.action_mask
    score, kl = drawn.numbers(len(mask)), drawn.numbers()
    expected = reference.shaped_rewards(score.tolist(), kl.tolist(), mask.tolist(), 0.3)
    empty = ~mask.any(dim=1)
    shaped = shape_rewards(torch.where(empty, poison, score), poisoned(kl, mask, poison), mask, kl_coef=0.3)
    torch.testing.assert_close(shaped, torch.tensor(expected))


@SMALL
@given(drawn=answers(), gamma=st.sampled_from([0.0, 0.9, 1.0]), gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_equals_the_double_sum(drawn: Answers, gamma: float, gae_lambda: float) -> None:
    mask, rewards, values = drawn.action_mask, drawn.numbers(), drawn.numbers()
    expected = reference.gae(rewards.tolist(), values.tolist(), mask.tolist(), gamma, gae_lambda)
    got = gae(poisoned(rewards, mask, math.nan), poisoned(values, mask, math.inf), mask, gamma=gamma, gae_lambda=gae_lambda)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, torch.tensor(theirs), atol=1e-5, rtol=1e-5)


@SMALL
@given(drawn=answers(), gamma=st.sampled_from([0.9, 1.0]))
def test_lambda_one_returns_are_the_rewards_to_come(drawn: Answers, gamma: float) -> None:
    mask = drawn.action_mask
    rewards = torch.where(mask, drawn.numbers(), 0)
    _, returns = gae(rewards, drawn.numbers(), mask, gamma=gamma, gae_lambda=1.0)
    to_come = [[sum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))] for row in rewards.tolist()]
    torch.testing.assert_close(returns, torch.where(mask, torch.tensor(to_come), 0), atol=1e-5, rtol=1e-5)


@SMALL
@given(drawn=answers())
def test_lambda_zero_advantages_are_one_step_errors(drawn: Answers) -> None:
    mask, rewards = drawn.action_mask, drawn.numbers()
    values = torch.where(mask, drawn.numbers(), 0)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    following = torch.cat((values[:, 1:], torch.zeros(len(values), 1)), dim=1)
    torch.testing.assert_close(advantages, torch.where(mask, rewards + 0.9 * following - values, 0))


def test_a_single_token_and_gradients() -> None:
    values = torch.tensor([[0.25]], requires_grad=True)
    advantages, returns = gae(torch.tensor([[1.0]]), values, torch.tensor([[True]]), gamma=0.9, gae_lambda=0.9)
    assert (advantages.item(), returns.item()) == (0.75, 1.0)
    assert not advantages.requires_grad and not returns.requires_grad


def test_last_true() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool()
    assert last_true(mask).int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]


@SMALL
@given(batches=st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), max_size=5), offset=st.sampled_from([0.0, 1e4]))
def test_running_moments_equal_those_of_all_scores(batches: list[list[float]], offset: float) -> None:
    moments, seen = RunningMoments(), []
    for batch in batches:
        scores = torch.tensor([x + offset for x in batch], dtype=torch.float64)
        moments.update(masked_sums(scores, torch.ones(len(batch), dtype=torch.bool)))
        seen += scores.tolist()
    assert moments.count == len(seen)
    if seen:
        assert moments.mean == pytest.approx(statistics.fmean(seen))
        deviation = statistics.pstdev(seen)
        if deviation > 1e-2:
            assert moments.std == pytest.approx(deviation, rel=1e-3)


@pytest.mark.parametrize(("score", "batches"), [(3.0, []), (3.0, [1]), (0.0, [2, 2]), (0.1, [6, 7]), (0.1, [1000, 1001])])
def test_scores_that_do_not_differ_scale_by_one(score: float, batches: list[int]) -> None:
    """Also where rounding leaves a variance of 1e-18, by which a score would be blown up."""
    moments = RunningMoments()
    for size in batches:
        moments.update(masked_sums(torch.full((size,), score), torch.ones(size, dtype=torch.bool)))
    assert moments.std == 1.0


def test_running_moments_resume() -> None:
    moments, resumed = RunningMoments(), RunningMoments()
    moments.update(masked_sums(torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, dtype=torch.bool)))
    resumed.load_state_dict(moments.state_dict())
    for both in (moments, resumed):
        both.update(masked_sums(torch.tensor([-5.0, 7.0]), torch.ones(2, dtype=torch.bool)))
    assert (resumed.count, resumed.mean, resumed.std) == (moments.count, moments.mean, moments.std)
