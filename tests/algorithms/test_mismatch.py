"""Sampler against trainer: sums against loops, the cap, and poison in every slot that a mask excludes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algorithms.losses import policy_loss
from rlhf.algorithms.mismatch import importance_weights, mismatch

from . import reference
from .draw import Answers, answers, poisoned

SMALL = settings(max_examples=50, deadline=None)
POISONS = [math.inf, -math.inf, math.nan]


@SMALL
@given(drawn=answers(), poison=st.sampled_from(POISONS))
def test_mismatch_equals_the_loop(drawn: Answers, poison: float) -> None:
    mask = drawn.action_mask
    logprobs, sampler = drawn.numbers(), drawn.numbers()
    got = mismatch(poisoned(logprobs, mask, poison), poisoned(sampler, mask, poison), mask)
    inside = [(b, a) for b, row in enumerate(mask.tolist()) for a, on in enumerate(row) if on]
    apart = [logprobs[i].item() - sampler[i].item() for i in inside]
    assert got.absolute.item() == pytest.approx(sum(abs(d) for d in apart), abs=1e-4)
    assert got.largest.item() == pytest.approx(max((abs(d) for d in apart), default=0.0), abs=1e-5)
    assert got.kl.item() == pytest.approx(sum(math.exp(d) - 1 - d for d in apart), rel=1e-4, abs=1e-4)


@SMALL
@given(drawn=answers(), cap=st.sampled_from([1.0, 1.5, 8.0]), poison=st.sampled_from(POISONS))
def test_importance_weights_equal_the_loop_and_scale_the_loss(drawn: Answers, cap: float, poison: float) -> None:
    mask = drawn.action_mask
    logprobs, old, sampler, advantages = drawn.numbers(), drawn.numbers(), drawn.numbers(), drawn.numbers()
    old_leaf = poisoned(old, mask, poison).requires_grad_()
    weights = importance_weights(old_leaf, poisoned(sampler, mask, poison), mask, cap=cap)
    assert not weights.requires_grad and (weights <= cap).all()
    current = poisoned(logprobs, mask, poison).requires_grad_()
    got = policy_loss(
        current, old_leaf.detach(), poisoned(advantages, mask, poison), mask, clip_range=0.2, log_ratio_clamp=1.0,
        importance=poisoned(weights, mask, poison),
    )  # fmt: skip
    plain_leaf = poisoned(logprobs, mask, poison).requires_grad_()
    plain = policy_loss(plain_leaf, old_leaf.detach(), poisoned(advantages, mask, poison), mask, clip_range=0.2, log_ratio_clamp=1.0)
    for b, row in enumerate(mask.tolist()):
        for a, inside in enumerate(row):
            weight = reference.importance_weight(old[b, a].item(), sampler[b, a].item(), cap) if inside else 1.0
            assert weights[b, a].item() == pytest.approx(weight, rel=1e-5)
            loss = reference.policy_loss(logprobs[b, a].item(), old[b, a].item(), advantages[b, a].item(), 0.2, 1.0, None)
            assert got.loss[b, a].item() == pytest.approx(weight * loss if inside else 0.0, rel=1e-4, abs=1e-5)
    got.loss.sum().backward()
    plain.loss.sum().backward()
    torch.testing.assert_close(current.grad, plain_leaf.grad * weights)
    assert torch.equal(got.clipped, plain.clipped) and torch.equal(got.ratio, plain.ratio)


def test_the_cap_bounds_an_unlikely_sample_and_leaves_the_others() -> None:
    sampler = torch.tensor([[-200.0, -1.0, -1.0, -1.0]])
    trainer = torch.tensor([[-0.1, -0.5, -1.0, -3.0]])
    weights = importance_weights(trainer, sampler, torch.ones(1, 4, dtype=torch.bool), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, math.exp(0.5), 1.0, math.exp(-2.0)]]))


def test_weights_make_the_samplers_tokens_stand_for_the_trainers() -> None:
    """Without truncation the weighted mean over the sampler's draws is the mean under the trainer."""
    generator = torch.Generator().manual_seed(0)
    sampler, trainer = (torch.randn(8, generator=generator).log_softmax(0) for _ in range(2))  # (V,)
    reward = torch.randn(8, generator=generator)  # (V,)
    tokens = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=generator).unsqueeze(0)  # (1, A)
    weights = importance_weights(trainer[tokens], sampler[tokens], torch.ones_like(tokens).bool(), cap=math.inf)
    expected, uncorrected = (trainer.exp() * reward).sum(), reward[tokens].mean()
    assert (weights * reward[tokens]).mean().item() == pytest.approx(expected.item(), abs=0.02)
    assert abs(uncorrected - expected) > 0.1
