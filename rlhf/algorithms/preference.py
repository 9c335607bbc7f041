"""Losses that learn a policy from pairs of answers directly, without a reward model.

Knows no models, ranks or averages: the caller sums and divides by the pairs of the whole optimizer step. B pairs, T tokens. Everything
is fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algorithms.masked import masked_sum


class PreferenceLoss(NamedTuple):
    loss: Tensor  # (B,)
    chosen_reward: Tensor  # (B,) implicit reward of the better answer, no gradient
    rejected_reward: Tensor  # (B,) of the worse one, no gradient


def answer_masks(chosen_ids: Tensor, rejected_ids: Tensor, chosen_mask: Tensor, rejected_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens from the first difference of a pair on: what is equal before it is the prompt, which no loss of a pair can tell apart.

    Args:
        chosen_ids, rejected_ids: (B, T) int64, padded on the right.
        chosen_mask, rejected_mask: (B, T) bool, true on tokens.

    Returns:
        (B, T) bool each. The very first token of a text is never true, as nothing comes before it to predict it from. A text that is
        the beginning of the other one, and two equal texts, have no true entry.
    """
    position = torch.arange(chosen_ids.shape[1], device=chosen_ids.device)  # (T,)
    differs = (chosen_ids != rejected_ids) | (chosen_mask != rejected_mask)  # (B, T)
    first = torch.where(differs, position, len(position)).amin(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    inside = position >= first  # (B, T)
    return chosen_mask & inside, rejected_mask & inside


def answer_logprobs(logprobs: Tensor, mask: Tensor, *, average: bool) -> Tensor:
    """Log-probability of each answer: the sum, or the mean, of its tokens' (B, T) where the mask (B, T) is true.

    Returns:
        (B,) fp32; 0 for an answer without tokens.
    """
    total = torch.where(mask, logprobs.float(), 0).sum(dim=1)  # (B,)
    return total / mask.sum(dim=1).clamp(min=1) if average else total


def preference_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, kind: str, beta: float, label_smoothing: float
) -> PreferenceLoss:
    """How badly the policy tells the better answer from the worse one, against a reference.

    With h = log(policy / ref)(chosen) - log(policy / ref)(rejected):

    - sigmoid: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h). Without e this is Rafailov et al. 2023, "Direct Preference
      Optimization", eq. 7; e is the share of labels taken to be wrong (Mitchell 2023, "A note on DPO with noisy preferences").
    - ipo: (h - 1 / (2 beta))^2 (Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17,
      where beta is tau). Its authors take means over the tokens of an answer instead of sums (addendum to Hugging Face's post
      "Preference Tuning LLMs with Direct Preference Optimization Methods").

    The implicit reward is beta log(policy / ref) (Rafailov et al. 2023, eq. 5, without the term that depends on the prompt alone).

    Args:
        chosen, rejected: (B,) log-probabilities under the policy; they carry the gradient. Sums for sigmoid, means for ipo.
        ref_chosen, ref_rejected: (B,) the same under the reference.
        kind: sigmoid or ipo.
        beta: above 0: the larger, the closer the policy stays to the reference.
        label_smoothing: e, for sigmoid.

    Raises:
        ValueError: another kind.
    """
    better, worse = chosen - ref_chosen, rejected - ref_rejected  # (B,), (B,)
    h = better - worse  # (B,)
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)
    elif kind == "ipo":
        loss = (h - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"kind must be sigmoid or ipo, got {kind}")
    return PreferenceLoss(loss, beta * better.detach(), beta * worse.detach())


@torch.no_grad()
def right_pairs(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """(B,) fp32: 1 where the better answer has the larger reward, 0.5 for a tie (as before the first step), else 0."""
    return (chosen_reward > rejected_reward).float() + 0.5 * (chosen_reward == rejected_reward).float()


@torch.no_grad()
def drift(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """() sum over tokens of 0.5 (log policy - log ref)^2, everything (B, T): how far the policy has gone from the reference.

    This is estimator k2 of Schulman 2020, "Approximating KL Divergence". The tokens are the data's and neither model sampled them, so
    that it is a distance like the KL, not the KL; k3 would be ruled by single tokens that the reference found all but impossible.
    """
    return masked_sum(0.5 * (logprobs.float() - ref_logprobs.float()).square(), mask)
