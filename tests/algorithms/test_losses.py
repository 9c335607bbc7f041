"""Losses against loops, gradients against autograd of the formula, and poison in every slot that a mask excludes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algorithms.losses import (
    end_scores,
    explained_variance,
    pairwise_end_loss,
    pairwise_token_loss,
    policy_loss,
    sft_loss,
    value_loss,
)

from . import reference
from .draw import Answers, answers, poisoned

SMALL = settings(max_examples=50, deadline=None)
POISONS = [math.inf, -math.inf, math.nan]


@SMALL
@given(drawn=answers(), dual_clip=st.sampled_from([None, 1.5, 3.0]), poison=st.sampled_from(POISONS))
def test_policy_loss_equals_the_loop_and_leaks_nothing(drawn: Answers, dual_clip: float | None, poison: float) -> None:
    mask = drawn.action_mask
    logprobs, old, advantages = drawn.numbers(), drawn.numbers(), drawn.numbers()
    current = poisoned(logprobs, mask, poison).requires_grad_()
    got = policy_loss(
        current, poisoned(old, mask, poison), poisoned(advantages, mask, poison), mask,
        clip_range=0.2, log_ratio_clamp=1.0, dual_clip=dual_clip,
    )  # fmt: skip
    for b, row in enumerate(mask.tolist()):
        for a, inside in enumerate(row):
            numbers = (logprobs[b, a].item(), old[b, a].item(), advantages[b, a].item())
            expected = reference.policy_loss(*numbers, 0.2, 1.0, dual_clip) if inside else 0.0
            assert got.loss[b, a].item() == pytest.approx(expected, abs=1e-5)
    got.loss.sum().backward()
    assert current.grad is not None and current.grad.isfinite().all() and (current.grad[~mask] == 0).all()
    assert (current.grad[got.clipped] == 0).all()
    assert (got.ratio[~mask] == 1).all() and not got.ratio.requires_grad and not got.clipped[~mask].any()


def test_policy_gradient_at_the_old_policy_is_minus_the_advantage() -> None:
    """d/dlogp of -A r at r = 1 is -A: the plain policy gradient."""
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = torch.tensor([[0.5, -3.0]])
    got = policy_loss(logprobs, logprobs.detach(), advantages, torch.ones(1, 2, dtype=torch.bool), clip_range=0.2, log_ratio_clamp=20)
    got.loss.sum().backward()
    assert torch.equal(logprobs.grad, -advantages) and not got.clipped.any()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clipped"),
    [(0.5, 1.0, True), (-0.5, 1.0, False), (0.5, -1.0, False), (-0.5, -1.0, True), (0.1, 1.0, False), (2.0, -1.0, False)],
)
def test_the_clip_stops_only_what_goes_too_far(log_ratio: float, advantage: float, clipped: bool) -> None:
    logprobs, one = torch.tensor([[log_ratio]], requires_grad=True), torch.tensor([[True]])
    got = policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), one, clip_range=0.2, log_ratio_clamp=20)
    got.loss.sum().backward()
    assert got.clipped.item() is clipped
    assert (logprobs.grad == 0).item() is clipped


def test_dual_clip_bounds_a_bad_action() -> None:
    one = torch.tensor([[True]])
    got = policy_loss(torch.tensor([[2.0]]), torch.zeros(1, 1), -torch.ones(1, 1), one, clip_range=0.2, log_ratio_clamp=20, dual_clip=3.0)
    assert got.loss.item() == 3.0 and got.clipped.item()


def test_a_huge_log_ratio_stays_finite() -> None:
    logprobs, one = torch.tensor([[500.0]], requires_grad=True), torch.tensor([[True]])
    got = policy_loss(logprobs, torch.zeros(1, 1), -torch.ones(1, 1), one, clip_range=0.2, log_ratio_clamp=20)
    got.loss.sum().backward()
    assert got.loss.item() == pytest.approx(math.exp(20)) and logprobs.grad.isfinite().all()


@SMALL
@given(drawn=answers(), clip_range=st.sampled_from([None, 0.2, 1.0]), poison=st.sampled_from(POISONS))
def test_value_loss_equals_the_loop_and_leaks_nothing(drawn: Answers, clip_range: float | None, poison: float) -> None:
    mask = drawn.action_mask
    values, old, returns = drawn.numbers(), drawn.numbers(), drawn.numbers()
    current = poisoned(values, mask, poison).requires_grad_()
    got = value_loss(current, poisoned(old, mask, poison), poisoned(returns, mask, poison), mask, value_clip_range=clip_range)
    for b, row in enumerate(mask.tolist()):
        for a, inside in enumerate(row):
            numbers = (values[b, a].item(), old[b, a].item(), returns[b, a].item())
            expected = reference.value_loss(*numbers, clip_range) if inside else 0.0
            assert got.loss[b, a].item() == pytest.approx(expected, abs=1e-5)
    got.loss.sum().backward()
    assert current.grad is not None and current.grad.isfinite().all() and (current.grad[~mask] == 0).all()
    assert (current.grad[got.clipped] == 0).all() and not got.clipped[~mask].any()
    if clip_range is None:
        assert not got.clipped.any()
        torch.testing.assert_close(current.grad, torch.where(mask, values - returns, 0))


@SMALL
@given(drawn=answers(min_length=1), poison=st.sampled_from(POISONS))
def test_sft_loss_equals_cross_entropy(drawn: Answers, poison: float) -> None:
    loss_mask = drawn.action_mask.flip(1)  # the tokens to learn come last, as the answer after a prompt
    ids = torch.randint(5, loss_mask.shape, generator=torch.Generator().manual_seed(0))
    logits = drawn.numbers(*loss_mask.shape, 5)
    predicts = torch.cat((loss_mask[:, 1:], torch.zeros(len(ids), 1, dtype=torch.bool)), dim=1)  # (B, T)
    ours = poisoned(logits, predicts[..., None], poison).requires_grad_()
    loss = sft_loss(ours, ids, loss_mask)
    theirs = logits.clone().requires_grad_()
    target = torch.where(loss_mask, ids, -100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(theirs[:, :-1].transpose(1, 2), target, ignore_index=-100, reduction="none")
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_pairwise_end_loss() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0, 0.0, 300.0]), torch.tensor([0.5, 1.0, 0.0, -300.0])
    expected = [reference.pair_loss(1.5), reference.pair_loss(-2.0), math.log(2), 0.0]
    assert pairwise_end_loss(chosen, rejected).tolist() == pytest.approx(expected)
    assert pairwise_end_loss(rejected, chosen)[3].item() == 600  # a large difference stays finite


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@SMALL
@given(chosen=IDS, rejected=IDS, shared=st.lists(st.integers(0, 2), max_size=3), pad=st.integers(0, 3), seed=st.integers(0, 999))
def test_pairwise_token_loss_equals_the_loop(chosen: list[int], rejected: list[int], shared: list[int], pad: int, seed: int) -> None:
    """Also where the padding id is a token of the text, and where one text is the beginning of the other."""
    texts, width = (shared + chosen, shared + rejected), 10
    scores = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    end = max(map(len, texts))
    ids = [torch.tensor([text + [pad] * (width - len(text))]) for text in texts]
    masks = [torch.arange(width)[None] < len(text) for text in texts]
    values = [poisoned(x, torch.arange(width) < end, math.nan)[None].requires_grad_() for x in scores]
    loss = pairwise_token_loss(*values, *ids, *masks)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(reference.pairwise_token_loss(*scores.tolist(), *texts), abs=1e-5)
    loss.sum().backward()
    assert all(v.grad.isfinite().all() and (v.grad[:, end:] == 0).all() for v in values)


def test_pairs_of_one_batch_do_not_mix() -> None:
    ids = torch.tensor([[[5, 1, 2, 0]], [[5, 3, 0, 0]]])
    values = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    masks = ids != 0
    alone = pairwise_token_loss(*values, *ids, *masks)
    empty = torch.zeros(1, 4, dtype=torch.bool)
    batch = [torch.cat((x, x)) for x in (*values, *ids)] + [torch.cat((m, empty)) for m in masks]
    assert pairwise_token_loss(*batch).tolist() == [alone.item(), 0.0]


def test_end_scores_for_either_padding() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [math.nan, 4.0, 5.0], [math.nan] * 3, [7.0, 8.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
    scores = end_scores(values, mask)
    assert scores.tolist() == [2.0, 5.0, 0.0, 9.0]
    scores.sum().backward()
    assert values.grad.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]]


def test_explained_variance() -> None:
    mask = torch.tensor([[True, True, True, False]])
    returns = poisoned(torch.tensor([[1.0, 2.0, 6.0, 0.0]]), mask, math.nan)
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(returns + 10, returns, mask).item() == 1  # a constant error is no variance
    assert explained_variance(torch.full_like(returns, 3.0), returns, mask).item() == 0
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3)
    assert explained_variance(returns, torch.ones_like(returns), mask).isnan()
    assert explained_variance(returns, returns, torch.zeros_like(mask)).isnan()
