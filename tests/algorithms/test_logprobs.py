"""Log-probabilities and entropy against loops, against autograd, and for the memory they hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.algorithms import logprobs as module
from rlhf.algorithms.logprobs import logprobs_and_entropy, token_entropy, token_logprobs

from . import reference


def draw(seed: int, rows: int = 3, positions: int = 4, vocabulary: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, positions, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (rows, positions), generator=generator)


def naive(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.double() / temperature, dim=-1)
    return logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([0.3, 1.0, 2.5]), vocabulary=st.integers(1, 9))
def test_equals_the_loop(seed: int, temperature: float, vocabulary: int) -> None:
    logits, ids = draw(seed, vocabulary=vocabulary)
    logprobs, entropy = logprobs_and_entropy(logits, ids, temperature=temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    for b, row in enumerate(logits.tolist()):
        for a, position in enumerate(row):
            assert logprobs[b, a].item() == pytest.approx(reference.log_softmax(position, temperature)[ids[b, a]], abs=1e-5)
            assert entropy[b, a].item() == pytest.approx(reference.entropy(position, temperature), abs=1e-5)
    assert torch.equal(token_logprobs(logits, ids, temperature=temperature), logprobs)
    assert torch.equal(token_entropy(logits, temperature=temperature), entropy)


@pytest.mark.parametrize("piece", [1, 10, 50, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_equals_autograd_of_the_formula(monkeypatch: pytest.MonkeyPatch, piece: int, temperature: float) -> None:
    """Whatever the size of a piece: less than a position, less than a row, some rows, all."""
    monkeypatch.setattr(module, "PIECE", piece)
    logits, ids = draw(0)
    weight, weight_h = torch.randn(2, *ids.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(ours, ids, temperature=temperature)
    (logprobs * weight + entropy * weight_h).sum().backward()
    expected, expected_h = naive(theirs, ids, temperature)
    (expected * weight + expected_h * weight_h).sum().backward()
    torch.testing.assert_close(logprobs.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_h.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["logprobs", "entropy"])
def test_gradient_of_one_alone(which: str) -> None:
    logits, ids = draw(3)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (token_logprobs(ours, ids) if which == "logprobs" else token_entropy(ours)).sum().backward()
    naive(theirs, ids, 1.0)[which == "entropy"].sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_pieces_cover_every_position_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for piece in (1, 7, 20, 35, 60, 10_000):
        monkeypatch.setattr(module, "PIECE", piece)
        seen = torch.zeros(5, 4, dtype=torch.long)
        for part in module._pieces(torch.Size((5, 4, 7))):
            seen[part] += 1
            assert seen[part].numel() * 7 <= max(piece, 7)
        assert (seen == 1).all(), piece


def test_reads_low_precision_in_fp32_and_keeps_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 64)
    logits, ids = draw(5, rows=4, positions=8, vocabulary=32)
    low = logits.bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logprobs, entropy = logprobs_and_entropy(low, ids)
    assert [t.dtype for t in saved if t.numel() == low.numel()] == [torch.bfloat16]  # the logits themselves, nothing else of that size
    torch.testing.assert_close(logprobs.double(), naive(low, ids, 1.0)[0].detach(), atol=1e-5, rtol=1e-5)
    (logprobs.sum() + entropy.sum()).backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16


def test_a_forbidden_token_is_no_nan() -> None:
    logits, ids = draw(7)
    logits[..., 2] = -torch.inf
    ids[ids == 2] = 1
    ids[0, 0] = 2
    logits.requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, ids)
    assert logprobs[0, 0] == -torch.inf and logprobs.flatten()[1:].isfinite().all() and entropy.isfinite().all()
    (logprobs.flatten()[1:].sum() + entropy.sum()).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_position_without_gradient_leaks_nothing(poison: float) -> None:
    logits, ids = draw(9)
    logits[1, 2] = poison
    logits.requires_grad_()
    keep = torch.ones(ids.shape, dtype=torch.bool)
    keep[1, 2] = False
    for statistic in (token_logprobs(logits, ids), token_entropy(logits)):
        torch.where(keep, statistic, 0).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert (logits.grad[1, 2] == 0).all()


def test_leaves_the_logits_alone() -> None:
    logits, ids = draw(11)
    before = logits.clone()
    logprobs_and_entropy(logits, ids, temperature=1.0)
    assert torch.equal(logits, before)


def test_no_answer_tokens() -> None:
    logprobs = token_logprobs(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.long))
    assert logprobs.shape == (2, 0)
