"""Log-probability and entropy of tokens, without a second copy of the logits.

Knows no models and no masks. B rows, A tokens, V vocabulary. The logits are by far the largest tensor of a step, so they are read in
pieces: only one piece at a time exists in fp32, forward and backward alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 2**24
"""Logits in one piece: 64 MiB in fp32, large enough to keep an accelerator busy."""


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the given tokens.

    Args:
        logits: (B, A, V) of any floating dtype; position a predicts ids[:, a].
        ids: (B, A) int64.
        temperature: above 0; the one the tokens were sampled with.

    Returns:
        (B, A) fp32, differentiable once.
    """
    logprobs, _ = _TokenStatistics.apply(logits, ids, temperature, False)
    return logprobs


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): (B, A, V) to (B, A) fp32, differentiable once."""
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)  # (B, A)
    return logprobs_and_entropy(logits, any_token, temperature=temperature)[1]


def logprobs_and_entropy(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and `token_entropy`, each (B, A) fp32, in one reading of the logits (B, A, V)."""
    return _TokenStatistics.apply(logits, ids, temperature, True)


def _pieces(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Slices over (B, A) that cover logits of this shape (B, A, V) in pieces of at most PIECE entries (one position at least)."""
    rows, positions, vocabulary = shape
    row_step = max(1, PIECE // max(1, positions * vocabulary))
    position_step = max(1, PIECE // vocabulary)
    for row in range(0, rows, row_step):
        for position in range(0, positions, position_step):
            yield slice(row, row + row_step), slice(position, position + position_step)


class _TokenStatistics(torch.autograd.Function):
    """Autograd by hand: the library's own formula would keep every piece in fp32 until the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        normalizer = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)  # (B, A)
        logprobs = torch.empty_like(normalizer)
        entropy = torch.empty_like(normalizer) if with_entropy else None
        for piece in _pieces(logits.shape):
            z = logits[piece].float() / temperature  # (b, a, V)
            normalizer[piece] = z.logsumexp(dim=-1)
            logprobs[piece] = z.gather(-1, ids[piece].unsqueeze(-1)).squeeze(-1) - normalizer[piece]
            if entropy is not None:
                # entr(p) = -p log p with entr(0) = 0, so that a logit of -inf (a forbidden token) adds nothing.
                entropy[piece] = torch.special.entr(z.sub_(normalizer[piece].unsqueeze(-1)).exp_()).sum(dim=-1)
        ctx.save_for_backward(logits, ids, normalizer, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor, None, None, None]:
        """With p = softmax(z): d logprob_i / d z_j = [i = j] - p_j and d H / d z_j = -p_j log p_j - p_j H."""
        logits, ids, normalizer, entropy = ctx.saved_tensors
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)  # (B, A, V)
        for piece in _pieces(logits.shape):
            grad = grad_logprobs[piece].unsqueeze(-1)  # (b, a, 1)
            p = (logits[piece].float() / ctx.temperature).sub_(normalizer[piece].unsqueeze(-1)).exp_()  # (b, a, V)
            unused = grad == 0
            if entropy is None:
                change = p.mul_(-grad)
            else:
                grad_h = grad_entropy[piece].unsqueeze(-1)  # type: ignore[index]
                unused = unused & (grad_h == 0)
                change = torch.special.entr(p).mul_(grad_h).addcmul_(p, -grad - grad_h * entropy[piece].unsqueeze(-1))
            change.scatter_add_(-1, ids[piece].unsqueeze(-1), grad)
            # A masked position gets exactly nothing, even where its logits are inf or NaN.
            grad_logits[piece] = change.div_(ctx.temperature).masked_fill_(unused, 0)
        return grad_logits, None, None, None
