"""Sums, means and whitening over the true entries of a mask.

Knows no ranks: it hands out plain sums, which the caller adds up over ranks before it uses them as denominators.

Selection is always `torch.where`: multiplying by a mask turns an inf in a padded slot into NaN (0 * inf).
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """() sum of x (any shape) where mask (same shape, bool) is true; 0 where nothing is. Differentiable."""
    return torch.where(mask, x, 0).sum()


def masked_mean(x: Tensor, mask: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """() mean of x where mask is true; 0 where nothing is.

    `denominator` replaces the count of this mask: with the count of the whole optimizer step, the parts of a step (micro-batches,
    ranks) add up to the mean over all its tokens, however it was cut.
    """
    count = mask.sum().clamp(min=1) if denominator is None else denominator
    return masked_sum(x, mask) / count


@torch.no_grad()
def masked_sums(x: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: count, sum and sum of squares of x where mask is true. Adding these over shards gives those of the whole."""
    chosen = torch.where(mask, x.double(), 0)
    return torch.stack((mask.sum().double(), chosen.sum(), chosen.square().sum()))


@torch.no_grad()
def whiten(
    x: Tensor, mask: Tensor, sums: Tensor, *, shift_mean: bool = True, unbiased: bool = False, eps: float = 1e-8
) -> Tensor:  # fmt: skip
    """x with unit variance, and zero mean unless `shift_mean` is false; zero where mask is false. Shape and dtype of x.

    `sums` (3,) are the `masked_sums` of everything to whiten together. The variance is the biased one, divided by the count, as in
    OpenAI's original code (tf.nn.moments); source: Huang et al. 2023, "The N Implementation Details of RLHF with PPO". `unbiased`
    divides by the count less one, as torch.var and TRL do.
    """
    count, total, squares = sums.unbind()
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    if unbiased:
        variance = variance * count / (count - 1).clamp(min=1)
    whitened = (x.double() - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0).to(x.dtype)


def mean_weights(mask: Tensor, how: str, *, tokens: Tensor, sequences: Tensor, parts: int) -> Tensor:
    """Weight of each token of a micro-batch in the mean over an optimizer step: (B, A) bool -> (B, A) fp64, zero where mask is false.

    Summed over all micro-batches and ranks the weights are 1, so that weighted sums add up to a mean.

    Args:
        mask: of this micro-batch.
        how: global, over all tokens of the step; local, over the tokens of each micro-batch and then over micro-batches (DeepSpeed-Chat's
            mask.sum(), averaged over ranks and accumulation steps by its engine); sequence, over the tokens of each sequence and then over
            sequences (Shao et al. 2024, "DeepSeekMath", eq. 3).
        tokens: () of the whole step.
        sequences: () with a token, of the whole step.
        parts: micro-batches of the whole step, over all ranks.
    """
    lengths = mask.sum(dim=1, keepdim=True).double()  # (B, 1)
    if how == "local":
        share = parts * lengths.sum()
    elif how == "sequence":
        share = sequences * lengths
    else:
        share = tokens.double()
    return torch.where(mask, 1 / share.clamp(min=1), 0)
