"""From the score of an answer to the advantage of each of its tokens.

Knows no models and no ranks. B answers, A tokens; action_mask (B, A) is true on the answer's tokens, which come first in every row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAME_SCORES = 1e-12
"""A variance below this share of the squared mean is rounding: the scores are all the same."""

GROUP_EPS = 1e-6
"""Keeps the division by a group's standard deviation finite (verl's value)."""


def last_true(mask: Tensor) -> Tensor:
    """(B, A) bool: only the last true entry of each row of a (B, A) mask; rows without one stay false."""
    trues_from_here_on = mask.flip(1).cumsum(dim=1).flip(1)  # (B, A)
    return mask & (trues_from_here_on == 1)


@torch.no_grad()
def shape_rewards(score: Tensor, kl: Tensor, action_mask: Tensor, *, kl_coef: float) -> Tensor:
    """The reward of each token: its KL penalty, and at the end what the answer scored.

    r_t = -kl_coef * kl_t, plus the score where t is the last token (Ziegler et al. 2019, eq. 2, spread over the tokens as in
    Stiennon et al. 2020, section 3.4).

    Args:
        score: (B,) reward of the whole answer.
        kl: (B, A) estimate for each token.
        action_mask: (B, A) bool.
        kl_coef: weight of the penalty.

    Returns:
        (B, A) fp32, zero beyond the answer; a row without any token is all zero.
    """
    penalty = torch.where(action_mask, -kl_coef * kl.float(), 0)  # (B, A)
    at_the_end = torch.where(last_true(action_mask), score.float()[:, None], 0)  # (B, A)
    return penalty + at_the_end


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, action_mask: Tensor, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over finished answers.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = sum_l (gamma * lambda)^l * delta_{t+l}, where everything beyond the answer counts
    as 0 (Schulman et al. 2015, "High-Dimensional Continuous Control Using GAE", eq. 11-16). Returns are A_t + V_t.

    Args:
        rewards: (B, A).
        values: (B, A), the critic's estimate before each token.
        action_mask: (B, A) bool.
        gamma: discount of a token later.
        gae_lambda: 0 trusts the critic after one token, 1 sums the rewards to the end.

    Returns:
        advantages and returns, each (B, A) fp32, zero beyond the answer.
    """
    rewards = torch.where(action_mask, rewards.float(), 0)  # (B, A)
    values = torch.where(action_mask, values.float(), 0)  # (B, A)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))  # (B, A)
    delta = rewards + gamma * next_values - values  # (B, A)
    advantages = torch.zeros_like(delta)
    later = delta.new_zeros(delta.shape[0])  # (B,) advantage of the token after t
    for t in reversed(range(delta.shape[1])):
        later = delta[:, t].add(later, alpha=gamma * gae_lambda)
        advantages[:, t] = later
    advantages = torch.where(action_mask, advantages, 0)
    return advantages, advantages + values


@torch.no_grad()
def rewards_to_go(rewards: Tensor, action_mask: Tensor, *, gamma: float) -> Tensor:
    """R_t = r_t + gamma * R_{t+1}: what an answer earns from a token on (REINFORCE++, Hu 2025, eq. 5, before its normalization).

    Args:
        rewards: (B, A).
        action_mask: (B, A) bool.

    Returns:
        (B, A) fp32, zero beyond the answer.
    """
    return gae(rewards, torch.zeros_like(rewards), action_mask, gamma=gamma, gae_lambda=1.0)[1]


@torch.no_grad()
def leave_one_out(returns: Tensor, samples: int) -> Tensor:
    """Less the mean of the other answers to the same prompt (RLOO: Ahmadian et al. 2024, eq. 6).

    Args:
        returns: (B,) of whole answers, row s * B / samples + b answers prompt b.
        samples: answers to a prompt, at least 2.

    Returns:
        (B,) fp32.
    """
    groups = returns.float().view(samples, -1)  # (samples, prompts)
    return ((groups - groups.mean(dim=0)) * (samples / (samples - 1))).flatten()


@torch.no_grad()
def group_normalized(returns: Tensor, samples: int, *, unbiased: bool) -> Tensor:
    """Less the mean of all answers to the same prompt, over their standard deviation (GRPO: Shao et al. 2024, section 4.1.2).

    A group of equal returns teaches nothing: its advantages are 0.

    Args:
        returns: (B,) of whole answers, row s * B / samples + b answers prompt b.
        samples: answers to a prompt, at least 2.
        unbiased: the variance is divided by the count less one.

    Returns:
        (B,) fp32.
    """
    groups = returns.double().view(samples, -1)  # (samples, prompts): in fp32 the mean of equal returns is off by as much as GROUP_EPS
    deviations = groups - groups.mean(dim=0)
    return (deviations / (groups.std(dim=0, correction=int(unbiased)) + GROUP_EPS)).flatten().float()


class RunningMoments:
    """Mean and standard deviation of all scores seen so far, kept without the scores.

    Batches are merged by count, mean and sum of squared deviations (Chan et al. 1979, "Updating Formulae and a Pairwise Algorithm
    for Computing Sample Variances"), in double precision.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self._deviations = 0.0  # sum over the scores of (score - mean)^2

    def update(self, sums: Tensor) -> None:
        """Takes a batch in as its `masked_sums` (3,): count, sum, sum of squares; added up over ranks, every rank stays the same."""
        count, total, squares = sums.tolist()
        if count == 0:
            return
        mean = total / count
        merged, gap = self.count + count, mean - self.mean
        self._deviations += max(squares - total * mean, 0.0) + gap * gap * self.count * count / merged
        self.mean += gap * count / merged
        self.count = merged

    @property
    def std(self) -> float:
        """Standard deviation (divided by the count); 1 while the scores do not differ, so that dividing by it is always safe."""
        variance = self._deviations / self.count if self.count else 0.0
        return math.sqrt(variance) if variance > SAME_SCORES * self.mean**2 else 1.0

    def normalize(self, scores: Tensor, *, center: bool, scale: bool) -> Tensor:
        """(B,) -> (B,): without the mean where `center`, divided by the standard deviation where `scale`."""
        return (scores - (self.mean if center else 0.0)) / (self.std if scale else 1.0)

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "deviations": self._deviations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self._deviations = state["count"], state["mean"], state["deviations"]
