"""Preference losses against loops over plain numbers, their minima and gradients, and poison in every slot that a mask excludes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algorithms.preference import answer_logprobs, answer_masks, drift, preference_loss, right_pairs

from .draw import Answers, answers, poisoned

SMALL = settings(max_examples=50, deadline=None)
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=6)
NUMBERS = st.floats(-30, 30)
WIDTH = 10


def slow_answer(text: list[int], other: list[int]) -> list[int]:
    """Positions of a text from the first one on that the other text does not share, the very first token never."""
    shared = 0
    while shared < min(len(text), len(other)) and text[shared] == other[shared]:
        shared += 1
    return [t for t in range(len(text)) if t >= max(shared, 1)]


def slow_loss(kind: str, h: float, beta: float, smoothing: float) -> float:
    """Straight from the papers: the logistic of beta h as a probability, or a squared distance."""
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    right = 1 / (1 + math.exp(-beta * h))
    wrong = 1 / (1 + math.exp(beta * h))
    return -(1 - smoothing) * math.log(right) - smoothing * math.log(wrong)


def batch(texts: tuple[list[int], list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = [torch.tensor([text + [pad] * (WIDTH - len(text))]) for text in texts]
    masks = [torch.arange(WIDTH)[None] < len(text) for text in texts]
    return ids[0], ids[1], masks[0], masks[1]


@SMALL
@given(chosen=IDS, rejected=IDS, shared=st.lists(st.integers(0, 2), max_size=3), pad=st.integers(0, 3))
def test_answer_masks_equal_the_loop(chosen: list[int], rejected: list[int], shared: list[int], pad: int) -> None:
    """Also where the padding id is a token of the text, and where one text is the beginning of the other."""
    texts = (shared + chosen, shared + rejected)
    found = answer_masks(*batch(texts, pad))
    for mask, text, other in zip(found, texts, reversed(texts), strict=True):
        assert mask.shape == (1, WIDTH) and mask[0].nonzero().flatten().tolist() == slow_answer(text, other)


def test_pairs_of_one_batch_do_not_mix() -> None:
    pairs = [([5, 1, 2], [5, 3]), ([7, 7, 7, 7], [7, 7, 7, 8]), ([4, 4], [4, 4])]
    rows = [batch(pair, 0) for pair in pairs]
    together = answer_masks(*(torch.cat(column) for column in zip(*rows, strict=True)))
    for i, row in enumerate(rows):
        assert all(torch.equal(whole[i : i + 1], alone) for whole, alone in zip(together, answer_masks(*row), strict=True))
    assert not together[0][2].any(), "two equal texts have no answer"


@SMALL
@given(drawn=answers(), average=st.booleans(), poison=st.sampled_from([math.inf, -math.inf, math.nan]))
def test_answer_logprobs_equal_the_loop_and_leak_nothing(drawn: Answers, average: bool, poison: float) -> None:
    mask, numbers = drawn.action_mask, drawn.numbers()
    ours = poisoned(numbers, mask, poison).requires_grad_()
    got = answer_logprobs(ours, mask, average=average)
    for b, row in enumerate(mask.tolist()):
        inside = [numbers[b, t].item() for t, true in enumerate(row) if true]
        assert got[b].item() == pytest.approx(sum(inside) / (max(1, len(inside)) if average else 1), abs=1e-5)
    got.sum().backward()
    assert ours.grad is not None and ours.grad.isfinite().all() and (ours.grad[~mask] == 0).all()


@SMALL
@given(
    rows=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=4), kind=st.sampled_from(["sigmoid", "ipo"]),
    beta=st.sampled_from([0.05, 0.1, 0.5, 1.0]), smoothing=st.sampled_from([0.0, 0.1, 0.4]),
)  # fmt: skip
def test_preference_loss_equals_the_loop(rows: list[tuple[float, ...]], kind: str, beta: float, smoothing: float) -> None:
    smoothing = smoothing if kind == "sigmoid" else 0.0
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    for tensor in columns[:2]:
        tensor.requires_grad_()
    got = preference_loss(*columns, kind=kind, beta=beta, label_smoothing=smoothing)
    for b, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(rows):
        h = (chosen - ref_chosen) - (rejected - ref_rejected)
        assert got.loss[b].item() == pytest.approx(slow_loss(kind, h, beta, smoothing), rel=1e-9, abs=1e-9)
        assert got.chosen_reward[b].item() == pytest.approx(beta * (chosen - ref_chosen), abs=1e-9)
        assert got.rejected_reward[b].item() == pytest.approx(beta * (rejected - ref_rejected), abs=1e-9)
    got.loss.sum().backward()
    assert columns[0].grad is not None and columns[1].grad is not None
    assert torch.equal(columns[0].grad, -columns[1].grad), "what lifts the better answer lowers the worse one"
    assert not got.chosen_reward.requires_grad and not got.rejected_reward.requires_grad


@pytest.mark.parametrize(
    ("kind", "beta", "smoothing", "best"),
    [
        ("sigmoid", 0.5, 0.1, math.log(0.9 / 0.1) / 0.5),  # beta h is the log odds that the label is right
        ("sigmoid", 0.1, 0.4, math.log(0.6 / 0.4) / 0.1),
        ("ipo", 0.5, 0.0, 1.0),
        ("ipo", 0.1, 0.0, 5.0),
    ],
)
def test_the_minimum_is_where_the_papers_put_it(kind: str, beta: float, smoothing: float, best: float) -> None:
    h = torch.tensor([best, best - 0.5, best + 0.5], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(3, dtype=torch.float64)
    loss = preference_loss(h, zeros, zeros, zeros, kind=kind, beta=beta, label_smoothing=smoothing).loss
    loss.sum().backward()
    assert h.grad is not None
    assert h.grad[0].item() == pytest.approx(0, abs=1e-9) and h.grad[1] < 0 < h.grad[2]


def test_without_smoothing_the_margin_may_grow_for_ever() -> None:
    h = torch.tensor([0.0, 50.0, 5000.0], requires_grad=True)
    zeros = torch.zeros(3)
    loss = preference_loss(h, zeros, zeros, zeros, kind="sigmoid", beta=0.1, label_smoothing=0.0).loss
    assert loss[0].item() == pytest.approx(math.log(2)) and loss[1] > loss[2] >= 0
    loss.sum().backward()
    assert h.grad is not None and h.grad[0].item() == pytest.approx(-0.05) and h.grad[1] < 0 and h.grad.isfinite().all()


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be sigmoid or ipo, got hinge"):
        preference_loss(*torch.zeros(4, 1), kind="hinge", beta=0.1, label_smoothing=0.0)


def test_a_tie_is_half_right() -> None:
    assert right_pairs(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.5, 0.0, 2.0])).tolist() == [1.0, 0.5, 0.0]


def test_drift() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ref = torch.zeros(2, 3)
    logprobs = poisoned(torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 0.0]]), mask, math.nan)
    assert drift(logprobs, ref, mask).item() == pytest.approx(0.5 * (1 + 4 + 0.25))
    assert drift(ref, ref, mask).item() == 0
