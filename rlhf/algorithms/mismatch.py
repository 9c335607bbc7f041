"""How far the engine that sampled is from the network that learns, and the correction for it.

Both hold the same weights, but their kernels and number formats differ, so that each gives a token a slightly different probability.
Knows no engine and no ranks: it hands out sums and weights. B rows, A answer tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.masked import masked_sum


class Mismatch(NamedTuple):
    absolute: Tensor  # () sum of |log p_trainer - log p_sampler| over tokens
    kl: Tensor  # () sum of the k3 estimate of KL(sampler || trainer), nats
    largest: Tensor  # () the largest |log p_trainer - log p_sampler|, 0 without any token


@torch.no_grad()
def mismatch(logprobs: Tensor, rollout_logprobs: Tensor, action_mask: Tensor) -> Mismatch:
    """Sums over the tokens of this rank; divided by their number over all ranks they are means.

    The KL is k3, mean of exp(d) - 1 - d with d = log p_trainer - log p_sampler: the tokens are the sampler's (Schulman 2020,
    "Approximating KL Divergence").

    Args:
        logprobs: (B, A) of the sampled tokens under the network that learns.
        rollout_logprobs: (B, A) of the same tokens under the engine that sampled them, from the same weights.
        action_mask: (B, A) bool.
    """
    difference = torch.where(action_mask, logprobs.float() - rollout_logprobs.float(), 0)  # (B, A)
    kl = kl_estimate(torch.zeros_like(difference), difference, "k3")  # (B, A)
    absolute = difference.abs()
    return Mismatch(masked_sum(absolute, action_mask), masked_sum(kl, action_mask), absolute.max())


@torch.no_grad()
def importance_weights(logprobs: Tensor, rollout_logprobs: Tensor, action_mask: Tensor, *, cap: float) -> Tensor:
    """min(p_trainer / p_sampler, cap): what a token's policy loss is multiplied by, so that its expectation is that over the network's
    own answers, up to the tokens that the cap bounds.

    Source: truncated importance sampling (Ionides 2008), for samplers that differ from the trainer Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training".

    Args:
        logprobs: (B, A) of the sampled tokens under the network that learns, before its first update on them.
        rollout_logprobs: (B, A) of the same tokens under the engine that sampled them.
        action_mask: (B, A) bool.

    Returns:
        (B, A) fp32 without gradient, in (0, cap]; 1 where the mask is false.
    """
    difference = torch.where(action_mask, logprobs.float() - rollout_logprobs.float(), 0)  # (B, A)
    return difference.exp().clamp(max=cap)
