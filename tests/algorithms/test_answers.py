"""Masks, scores and weights of answers: against loops, and with poison where nothing counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algorithms.answers import answer_masks, answer_scores, shape_scores
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.losses import policy_loss
from rlhf.algorithms.masked import masked_sums, mean_weights, whiten

from .draw import Answers, answers, poisoned

SMALL = settings(max_examples=50, deadline=None)


@SMALL
@given(
    drawn=answers(), pad_is_end=st.booleans(), slot=st.sampled_from(["end", "past_end"]), least=st.integers(0, 3), ends=st.integers(0, 255)
)
def test_masks_equal_the_loop(drawn: Answers, pad_is_end: bool, slot: str, least: int, ends: int) -> None:
    mask = drawn.action_mask
    ended = torch.tensor([bool(ends >> (b % 8) & 1) for b in range(len(mask))])
    masks = answer_masks(mask, ended, pad_is_end=pad_is_end, score_slot=slot, min_answer_tokens=least)
    for b, row in enumerate(mask.tolist()):
        counted = sum(row) - (1 if pad_is_end and ended[b] and any(row) else 0)
        end_alone = counted < sum(row) == 1
        rewarded = min(counted + (slot == "past_end" or end_alone), len(row))
        trained = counted if counted >= least else 0
        assert [int(m[b].sum()) for m in masks] == [counted, rewarded, trained]
    assert all((m[:, :-1] >= m[:, 1:]).all() for m in masks), "from the first token on, without a gap"


@SMALL
@given(drawn=answers(), poison=st.sampled_from([math.inf, math.nan]))
def test_scores_equal_the_loop(drawn: Answers, poison: float) -> None:
    counted, prompt = drawn.action_mask, 2
    prompt_mask = torch.tensor([False, True]).expand(len(counted), prompt)
    values = drawn.numbers(len(counted), prompt + counted.shape[1])
    mask = torch.cat([prompt_mask, counted], dim=1)
    got = {how: answer_scores(poisoned(values, mask, poison), prompt_mask, counted, score_from=how) for how in ("end", "mean")}
    for b, row in enumerate(counted.sum(dim=1).tolist()):
        answer = values[b, prompt : prompt + row]
        assert got["end"][b].item() == values[b, prompt + row - 1].item(), "the prompt's last token where the answer has none"
        assert got["mean"][b].item() == pytest.approx(answer.mean().item() if row else 0.0, abs=1e-5)


def test_nothing_is_done_to_scores_unless_asked() -> None:
    scores = torch.tensor([1e6, -3.0])
    off = {"missing_eos_penalty": None, "missing_eos_score": None, "length_penalty": 0.0, "length_free": 0, "clip": None}
    assert torch.equal(shape_scores(scores, torch.tensor([True, False]), torch.tensor([9, 0]), **off), scores)


@SMALL
@given(drawn=answers(), how=st.sampled_from(["global", "local", "sequence"]), cut=st.integers(1, 4))
def test_weights_of_a_step_sum_to_one(drawn: Answers, how: str, cut: int) -> None:
    mask = drawn.action_mask
    parts = list(mask.split(cut))
    counts = {"tokens": mask.sum(), "sequences": mask.any(dim=1).sum()}
    weights = [mean_weights(part, how, parts=len(parts), **counts) for part in parts]
    full = sum(part.any() for part in parts) / len(parts) if how == "local" else mask.any()
    assert torch.cat(weights).sum().item() == pytest.approx(float(full))
    assert (torch.cat(weights)[~mask] == 0).all()
    for part, weight in zip(parts, weights, strict=True):
        by_row = weight.sum(dim=1)[part.any(dim=1)]
        if how == "sequence" and len(by_row):
            torch.testing.assert_close(by_row, torch.full_like(by_row, 1 / int(counts["sequences"])))
        elif part.any():
            assert weight[part].unique().numel() == 1, "tokens of a part weigh the same"


def test_unbiased_whitening_has_the_variance_of_a_sample() -> None:
    x, mask = torch.tensor([[1.0, 4.0, 7.0, 99.0]]), torch.tensor([[True, True, True, False]])
    assert whiten(x, mask, masked_sums(x, mask), unbiased=True)[mask].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)
    one = torch.tensor([[True, False, False, False]])
    assert whiten(x, one, masked_sums(x, one), unbiased=True).isfinite().all()


def test_a_clamped_estimate_stays_finite_and_so_does_its_gradient() -> None:
    difference = torch.tensor([-500.0, 0.5, 500.0], requires_grad=True)
    for estimator in ("k1", "k2", "k3"):
        bounded = kl_estimate(difference, torch.zeros(3), estimator, clamp=2.0)
        assert torch.equal(bounded, kl_estimate(torch.tensor([-2.0, 0.5, 2.0]), torch.zeros(3), estimator))
        difference.grad = None
        bounded.sum().backward()
        assert difference.grad is not None and difference.grad.isfinite().all() and (difference.grad[[0, 2]] == 0).all()


def test_a_ratio_without_a_clamp_is_the_ratio() -> None:
    one = torch.tensor([[True]])
    got = policy_loss(torch.tensor([[30.0]]), torch.zeros(1, 1), -torch.ones(1, 1), one, clip_range=0.2, log_ratio_clamp=None)
    assert got.loss.item() == pytest.approx(math.exp(30))
