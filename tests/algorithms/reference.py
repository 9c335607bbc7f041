"""Slow and obvious versions of the algorithms: loops over Python floats, straight from the formulas.

Know no torch, so that they share no mistake with what they judge. B rows of A numbers, as nested lists.
"""

from __future__ import annotations

import math

Rows = list[list[float]]
Masks = list[list[bool]]


def log_softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    total = math.log(sum(math.exp(x - top) for x in scaled)) + top
    return [x - total for x in scaled]


def entropy(logits: list[float], temperature: float = 1.0) -> float:
    return -sum(math.exp(logp) * logp for logp in log_softmax(logits, temperature))


def shaped_rewards(score: list[float], kl: Rows, mask: Masks, kl_coef: float) -> Rows:
    rows = []
    for b, row in enumerate(mask):
        rewards = [-kl_coef * kl[b][t] if inside else 0.0 for t, inside in enumerate(row)]
        if any(row):
            rewards[max(t for t, inside in enumerate(row) if inside)] += score[b]
        rows.append(rewards)
    return rows


def gae(rewards: Rows, values: Rows, mask: Masks, gamma: float, gae_lambda: float) -> tuple[Rows, Rows]:
    """The double sum of the paper, without the recursion."""
    advantages, returns = [], []
    for reward, value, row in zip(rewards, values, mask, strict=True):
        length = sum(row)
        v = [*value[:length], 0.0]
        delta = [reward[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        a = [sum((gamma * gae_lambda) ** (later - t) * delta[later] for later in range(t, length)) for t in range(length)]
        padding = [0.0] * (len(row) - length)
        advantages.append(a + padding)
        returns.append([a[t] + v[t] for t in range(length)] + padding)
    return advantages, returns


def policy_loss(logprob: float, old: float, advantage: float, clip_range: float, clamp: float, dual_clip: float | None) -> float:
    ratio = math.exp(min(max(logprob - old, -clamp), clamp))
    bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
    loss = max(-advantage * ratio, -advantage * bounded)
    if dual_clip is not None and advantage < 0:
        loss = min(loss, -advantage * dual_clip)
    return loss


def value_loss(value: float, old: float, target: float, clip_range: float | None) -> float:
    if clip_range is None:
        return 0.5 * (value - target) ** 2
    bounded = min(max(value, old - clip_range), old + clip_range)
    return 0.5 * max((value - target) ** 2, (bounded - target) ** 2)


def pair_loss(difference: float) -> float:
    return math.log1p(math.exp(-difference))


def pairwise_token_loss(chosen: list[float], rejected: list[float], chosen_ids: list[int], rejected_ids: list[int]) -> float:
    """The ids come without padding; the scores go on over it."""
    end = max(len(chosen_ids), len(rejected_ids))
    longer = [ids + [None] * (end - len(ids)) for ids in (chosen_ids, rejected_ids)]
    first = next((t for t in range(end) if longer[0][t] != longer[1][t]), end - 1)
    losses = [pair_loss(chosen[t] - rejected[t]) for t in range(first, end)]
    return sum(losses) / len(losses)


def importance_weight(logprob: float, sampler: float, cap: float) -> float:
    return min(math.exp(logprob - sampler), cap)
