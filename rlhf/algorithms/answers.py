"""Which tokens of an answer count for what, and from the reward model's outputs to the score of an answer.

Knows no models and no ranks. B answers, A tokens; action_mask (B, A) is true on the answer's tokens, which come first in every row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.advantages import last_true


class AnswerMasks(NamedTuple):
    counted: Tensor  # (B, A) bool: tokens that are no padding; the reward model reads up to the last of them
    rewarded: Tensor  # (B, A) bool: slots with a reward and an advantage, the last of them with the score
    trained: Tensor  # (B, A) bool: tokens that the losses look at


def answer_masks(action_mask: Tensor, ended: Tensor, *, pad_is_end: bool, score_slot: str, min_answer_tokens: int) -> AnswerMasks:
    """The three masks of an answer, which are one and the same unless a key says otherwise.

    DeepSpeed-Chat (ppo_trainer.py: compute_rewards, train_rlhf) trains on tokens that are not padding and puts the score one past the
    last of them. Where padding and end of turn are one token, that slot is the end of turn: rewarded and never trained.

    Args:
        action_mask: (B, A) bool, the end-of-turn token included.
        ended: (B,) bool: the last token is the end of turn.
        pad_is_end: the end of turn is padding.
        score_slot: end, the last counted token, or the end of turn where nothing is counted; or past_end, the one after the last counted
            token unless the row is full.
        min_answer_tokens: an answer with fewer counted tokens is not trained on.
    """
    end = last_true(action_mask) & ended[:, None]  # (B, A)
    counted = action_mask & ~end if pad_is_end else action_mask
    lengths = counted.sum(dim=1, keepdim=True)  # (B, 1)
    rewarded = counted | (end & (lengths == 0))  # or the score of an end alone would be lost, to its group's baseline as well
    if score_slot == "past_end":
        rewarded = torch.arange(action_mask.shape[1], device=action_mask.device) <= lengths
    return AnswerMasks(counted, rewarded, counted & (lengths >= min_answer_tokens))


def answer_scores(values: Tensor, prompt_mask: Tensor, counted: Tensor, *, score_from: str) -> Tensor:
    """What the reward model says of each answer.

    Args:
        values: (B, P + A) its output at every position.
        prompt_mask: (B, P) bool.
        counted: (B, A) bool.
        score_from: end, the output at the last counted token (that of the prompt where the answer has none); or mean, over the answer's
            counted tokens.

    Returns:
        (B,) fp32.
    """
    if score_from == "mean":
        answer = values[:, prompt_mask.shape[1] :].float()  # (B, A)
        return torch.where(counted, answer, 0).sum(dim=1) / counted.sum(dim=1).clamp(min=1)
    last = last_true(torch.cat([prompt_mask, counted], dim=1))  # (B, P + A)
    return torch.where(last, values.float(), 0).sum(dim=1)


def shape_scores(
    scores: Tensor,
    ended: Tensor,
    lengths: Tensor,
    *,
    missing_eos_penalty: float | None,
    missing_eos_score: float | None,
    length_penalty: float,
    length_free: int,
    clip: float | None,
) -> Tensor:
    """What is added to and bounded in the scores of whole answers, in the order of the arguments.

    Sources: a score for answers without an end, Ziegler et al. 2019 (their code: penalty_reward_value); a penalty, TRL's
    missing_eos_penalty; a linear penalty beyond a length, Yu et al. 2025, "DAPO", eq. 13, without its upper end; the clip,
    DeepSpeed-Chat.

    Args:
        scores: (B,).
        ended: (B,) bool.
        lengths: (B,) answer tokens.

    Returns:
        (B,) fp32.
    """
    scores = scores.float()
    if missing_eos_score is not None:
        scores = torch.where(ended, scores, missing_eos_score)
    if missing_eos_penalty is not None:
        scores = scores - missing_eos_penalty * (~ended).float()
    if length_penalty:
        scores = scores - length_penalty * (lengths - length_free).clamp(min=0)
    return scores if clip is None else scores.clamp(-clip, clip)
