"""What is minimized: one loss for each token or each pair.

Knows no models, ranks or averages: the caller sums and divides by a count taken over the whole optimizer step, so that a step gives the
same gradient however it is cut. B rows, A answer tokens, T tokens, V vocabulary. Losses are fp32, and 0 where the mask is false.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algorithms.advantages import last_true
from rlhf.algorithms.logprobs import token_logprobs
from rlhf.algorithms.masked import masked_sums


class PolicyLoss(NamedTuple):
    loss: Tensor  # (B, A)
    ratio: Tensor  # (B, A) new over old probability, 1 where masked, no gradient
    clipped: Tensor  # (B, A) bool: the clip decided the loss, so that the token pushes the policy no further


class ValueLoss(NamedTuple):
    loss: Tensor  # (B, A) with the factor 0.5
    clipped: Tensor  # (B, A) bool: the clip decided the loss


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_range: float,
    log_ratio_clamp: float | None,
    dual_clip: float | None = None,
    importance: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate objective, to be minimized: max(-A r, -A clip(r, 1 - c, 1 + c)) (Schulman et al. 2017, "PPO", eq. 7).

    Args:
        logprobs: (B, A) of the policy that learns; carries the gradient.
        old_logprobs: (B, A) of the policy before its first update on these tokens.
        advantages: (B, A).
        action_mask: (B, A) bool.
        clip_range: c.
        log_ratio_clamp: bound on |log r| before the exponential, so that it stays finite. None: off.
        dual_clip: bounds the loss of a bad action by -A * dual_clip, however large r gets (Ye et al. 2020, "Mastering Complex Control in
            MOBA Games with Deep RL", eq. 5); above 1. None: off.
        importance: (B, A) factor of each token's loss, without gradient; see `rlhf.algorithms.mismatch`. None: 1.
    """
    # Masked slots are replaced before the exponential: behind it, their inf would still reach the gradient as 0 * inf.
    log_ratio = torch.where(action_mask, logprobs.float() - old_logprobs.float(), 0)  # (B, A)
    advantages = torch.where(action_mask, advantages.float(), 0)  # (B, A)
    ratio = (log_ratio if log_ratio_clamp is None else log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)).exp()
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(free, bounded)
    clipped = bounded > free
    if dual_clip is not None:
        ceiling = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        clipped = clipped | (loss > ceiling)
        loss = torch.minimum(loss, ceiling)
    if importance is not None:
        loss = loss * torch.where(action_mask, importance.float(), 1)
    return PolicyLoss(loss, ratio.detach(), clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor, *, value_clip_range: float | None) -> ValueLoss:
    """0.5 * max((V - R)^2, (V_clip - R)^2) with V_clip within `value_clip_range` of the old value.

    Source: OpenAI baselines, ppo2/model.py; Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9.

    Args:
        values: (B, A) of the critic that learns; carries the gradient.
        old_values: (B, A) of the critic when the answers were scored.
        returns: (B, A), the target.
        action_mask: (B, A) bool.
        value_clip_range: None is the plain squared error.
    """
    values = torch.where(action_mask, values.float(), 0)  # (B, A)
    returns = torch.where(action_mask, returns.float(), 0)  # (B, A)
    free = (values - returns).square()
    if value_clip_range is None:
        return ValueLoss(0.5 * free, torch.zeros_like(action_mask))
    old_values = torch.where(action_mask, old_values.float(), 0)  # (B, A)
    bounded = (values.clamp(old_values - value_clip_range, old_values + value_clip_range) - returns).square()
    return ValueLoss(0.5 * torch.maximum(free, bounded), bounded > free)


def sft_loss(logits: Tensor, ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Negative log-likelihood of each next token that is to be learned.

    Args:
        logits: (B, T, V) of any floating dtype.
        ids: (B, T) int64.
        loss_mask: (B, T) bool, true on the tokens to predict.

    Returns:
        (B, T - 1): entry t is the loss of token t + 1.
    """
    # All T positions are scored and the last is dropped: cutting the logits themselves would cost a padded copy in the backward pass.
    following = ids.roll(-1, dims=1)  # (B, T)
    nll = -token_logprobs(logits, following)[:, :-1]  # (B, T - 1)
    return torch.where(loss_mask[:, 1:], nll, 0)


def pairwise_end_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected): (B,) and (B,) to (B,) (Ouyang et al. 2022, "InstructGPT", eq. 1)."""
    return -logsigmoid(chosen_scores.float() - rejected_scores.float())


def pairwise_token_loss(
    chosen_values: Tensor,
    rejected_values: Tensor,
    chosen_ids: Tensor,
    rejected_ids: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
) -> Tensor:
    """Mean of -log sigmoid(chosen_t - rejected_t) from the first token that differs to the end of the longer text.

    This is DeepSpeed-Chat's loss (its reward_model.py): the shorter text is judged on its padding, too. Two texts that never differ
    are compared at their last token. Everything is (B, T) and padded on the right; the masks are true on tokens.

    Returns:
        (B,) one loss a pair; 0 for a pair without any token.
    """
    position = torch.arange(chosen_ids.shape[1], device=chosen_ids.device)  # (T,)
    either = chosen_mask | rejected_mask  # (B, T)
    last = torch.where(either, position, -1).amax(dim=1, keepdim=True)  # (B, 1)
    differs = (chosen_ids != rejected_ids) | (chosen_mask != rejected_mask)  # (B, T)
    first = torch.where(differs, position, last).amin(dim=1, keepdim=True)  # (B, 1)
    compared = (first <= position) & (position <= last)  # (B, T)
    # Replaced before the logarithm, so that nothing outside reaches the gradient.
    difference = torch.where(compared, chosen_values.float() - rejected_values.float(), 0)
    loss = torch.where(compared, -logsigmoid(difference), 0)
    return loss.sum(dim=1) / compared.sum(dim=1).clamp(min=1)


class Comparisons(NamedTuple):
    """Every two answers of a prompt with different ranks, as positions in the list of answers that there are."""

    better: Tensor  # (C,) int64
    worse: Tensor  # (C,) int64
    weight: Tensor  # (C,) fp32: one over the comparisons of the prompt, so that those of a prompt sum to 1


def comparisons(ranks: Tensor) -> Comparisons:
    """The K-choose-2 comparisons of each prompt, less its ties (Ouyang et al. 2022, "InstructGPT", section 3.5: they are one element of the
    batch, and each answer goes through the model once).

    Args:
        ranks: (B, K) of the answers to B prompts, smaller is better; -1: no answer.

    Returns:
        C comparisons, prompt by prompt. They count the answers that there are slot by slot: the first one of each prompt, then the
        second one of each prompt, and so on, as `x.transpose(0, 1)[(ranks >= 0).T]` lists them for any x (B, K, ...).
    """
    there = ranks >= 0  # (B, K)
    position = (there.T.flatten().cumsum(dim=0) - 1).view(ranks.shape[1], -1).T  # (B, K)
    before = ranks.unsqueeze(2) < ranks.unsqueeze(1)  # (B, K, K): the first answer is better than the second
    compared = before & there.unsqueeze(2) & there.unsqueeze(1)  # (B, K, K)
    prompt, better, worse = compared.nonzero(as_tuple=True)  # (C,), (C,), (C,)
    weight = 1 / compared.sum(dim=(1, 2))[prompt].float()  # (C,)
    return Comparisons(position[prompt, better], position[prompt, worse], weight)


def end_scores(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) fp32: the value (B, T) at the last true position of the mask (B, T), wherever the padding is; 0 for an empty row."""
    return torch.where(last_true(mask), values.float(), 0).sum(dim=1)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """() fp32: 1 - Var(returns - values) / Var(returns) over the mask; everything else (B, A).

    1 is a perfect critic, 0 one that knows only the mean, NaN where the returns do not vary.
    """
    residual, target = (_variance(x, mask) for x in (returns.double() - values.double(), returns.double()))
    return (1 - residual / torch.where(target > 0, target, torch.nan)).float()


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    count, total, _ = masked_sums(x, mask).unbind()
    centred = x - total / count.clamp(min=1)
    return masked_sums(centred, mask)[2] / count.clamp(min=1)
