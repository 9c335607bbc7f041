"""From logits to tokens: one uniform number a token, turned into a token by the inverse of the distribution's sum.

The number comes from a hash of (seed, sequence, position), so that a sequence draws the same whatever batch, slot, rank or device it
is in. B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
"""Arithmetic is that of unsigned 32-bit numbers, held in int64."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn, the same for all of a rollout."""

    temperature: float
    """0: the most likely token."""
    top_k: int
    """0: off."""
    top_p: float
    """1: off."""
    min_new_tokens: int
    """No stop token before so many."""
    stop_ids: tuple[int, ...]
    pad_id: int

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


def mix(h: Tensor) -> Tensor:
    """A bijection of 32-bit numbers whose output bits depend on all input bits (the finalizer of MurmurHash3, Appleby 2011)."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def uniforms(seed: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
    """() or (B,), (B,), (B,) int64 -> (B,) fp32 in [0, 1), multiples of 2^-24."""
    h = mix((seed & MASK) ^ 0x9E3779B9)
    h = mix(h ^ (sequence & MASK))
    h = mix((h + 0x9E3779B9 * (position & MASK)) & MASK)
    return (h >> 8).float() * 2.0**-24


def filtered(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(B, V) -> (B, V) fp32: -inf outside the top k, and outside the smallest set of the most likely tokens with mass top_p.

    The order is transformers': temperature, top k, top p (Holtzman et al. 2020, section 3.1).
    """
    scores = logits.float()
    if top_k > 0:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]  # (B, 1)
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered, index = scores.sort(dim=-1, descending=True)
        mass = (ordered / temperature).softmax(dim=-1)
        outside = mass.cumsum(dim=-1) - mass >= top_p  # the mass before a token already suffices
        scores = scores.masked_fill(outside.scatter(-1, index, outside), -torch.inf)
    return scores


def choose(logits: Tensor, candidates: Tensor, uniform: Tensor | None, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Draws a token from `candidates` and gives its log-probability under `logits`.

    Args:
        logits: (B, V) of the model.
        candidates: (B, V) the same with what must not be drawn at -inf.
        uniform: (B,) fp32; nothing at a temperature of 0.

    Returns:
        (B,) int64 tokens; (B,) fp32 log-probabilities under softmax(logits / temperature), nothing left out (temperature 0: softmax(logits)).
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        tokens = candidates.argmax(dim=-1)
    else:
        assert uniform is not None
        mass = (candidates.float() / temperature).softmax(dim=-1)
        # A GPU adds in an order that depends on the column, so that sums between two candidates may differ by a rounding: only candidates count.
        sums = mass.cumsum(dim=-1).masked_fill_(mass == 0, 0.0)  # (B, V)
        total = sums.amax(dim=-1, keepdim=True)
        below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not carry the number past the last candidate
        # The first whose sum passes the number. An idle row's logits may be anything, NaN among it: it draws the first token.
        tokens = (sums > torch.minimum(uniform.unsqueeze(1) * total, below)).int().argmax(dim=-1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def choose_each(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`filtered` and `choose` with settings of each row's own. A row draws the same whether others filter or not.

    Args:
        logits: (B, V).
        uniform: (B,) fp32.
        temperature: (B,) fp32, 0: the most likely token.
        top_k: (B,) int64, 0: off. None: no row filters, which saves sorting the vocabulary.
        top_p: (B,) fp32, 1: off. None together with `top_k`.

    Returns:
        (B,) int64 tokens; (B,) fp32 log-probabilities under softmax(logits / temperature), nothing left out (temperature 0: softmax(logits)).
    """
    scores = logits.float()
    greedy = temperature == 0
    warmth = torch.where(greedy, 1.0, temperature)[:, None]  # (B, 1)
    candidates = scores if top_k is None or top_p is None else _filtered_each(scores, warmth, top_k, top_p)
    drawn, _ = choose(logits, candidates / warmth, uniform, temperature=1.0)
    tokens = torch.where(greedy, scores.argmax(dim=-1), drawn)
    logprobs = (scores / warmth).log_softmax(dim=-1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _filtered_each(scores: Tensor, warmth: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(B, V) fp32, (B, 1), (B,), (B,) -> (B, V), what may not be drawn at -inf."""
    ordered, index = scores.sort(dim=-1, descending=True)
    vocabulary = scores.shape[-1]
    last = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)[:, None] - 1  # (B, 1)
    kept = ordered.masked_fill(ordered < ordered.gather(1, last), -torch.inf)
    mass = (kept / warmth).softmax(dim=-1)
    outside = mass.cumsum(dim=-1) - mass >= top_p[:, None]
    outside &= (top_p < 1)[:, None]  # rounding of the sum cuts nothing off where nothing is to be cut
    return torch.empty_like(scores).scatter(1, index, kept.masked_fill(outside, -torch.inf))
