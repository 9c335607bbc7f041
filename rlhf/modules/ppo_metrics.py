"""What one PPO iteration measures, by name: from sums over tokens and ranks to the numbers in metrics.csv.

Knows no network and no rank. docs/metrics.md says what each name means.
"""

from __future__ import annotations

from collections.abc import Sequence

BY_TOKEN = {
    "mismatch_abs": "rollout/mismatch_abs",
    "mismatch_kl": "rollout/mismatch_kl",
    "importance": "actor/importance_weight",
}
"""Sums that are there only where the sampler gave log-probabilities."""


def answer_metrics(total: dict[str, float], moments: dict[str, Sequence[float]], *, kl_coef: float) -> dict[str, float]:
    """Of an iteration's answers, before anything is learned from them.

    Args:
        total: sums over all answers or all their tokens.
        moments: of score, advantage, return and, with a critic, error (return less value): count, sum and sum of squares.
    """
    rows, tokens = total["rows"], max(1.0, total["tokens"])
    score, advantage, returns = (mean_and_variance(moments[name]) for name in ("score", "advantage", "return"))
    metrics = {
        "rollout/reward": score[0],
        "rollout/reward_std": score[1] ** 0.5,
        "rollout/shaped_reward": total["shaped"] / rows,
        "rollout/return": total["reward"] / rows,
        "rollout/kl": total["k1"] / rows,
        "rollout/kl_k3": total["k3"] / rows,
        "rollout/kl_per_token": total["k1"] / tokens,
        "rollout/length": total["tokens"] / rows,
        "rollout/eos_rate": total["ended"] / rows,
        "ppo/kl_coef": kl_coef,
        "ppo/advantage_mean": advantage[0],
        "ppo/advantage_std": advantage[1] ** 0.5,
        "ppo/return_mean": returns[0],
        "ppo/return_std": returns[1] ** 0.5,
    }
    if "error" in moments:
        metrics["critic/explained_variance"] = 1 - mean_and_variance(moments["error"])[1] / max(returns[1], 1e-12)
    return metrics | {name: total[key] / tokens for key, name in BY_TOKEN.items() if key in total}


def learning_metrics(totals: dict[str, float]) -> dict[str, float]:
    """Of all minibatches of an iteration: means over their tokens, whatever `ppo.loss_mean` the loss is averaged with."""
    tokens = max(1.0, totals["tokens"])
    metrics = {"ppo/optimizer_steps": totals["steps"]}
    if "value_loss" in totals:
        metrics |= {"critic/loss": totals["value_loss"] / tokens, "critic/clip_fraction": totals["value_clipped"] / tokens}
    if "plain_loss" in totals:
        metrics["actor/ptx_loss"] = totals["plain_loss"] / max(1.0, totals["plain_tokens"])
    if "policy_loss" in totals:
        metrics |= {
            "actor/loss": totals["policy_loss"] / tokens,
            "actor/entropy": totals["entropy"] / tokens,
            "actor/clip_fraction": totals["clipped"] / tokens,
            "actor/approx_kl": totals["approx_kl"] / tokens,
            "actor/approx_kl_k3": totals["approx_kl_k3"] / tokens,
            "actor/ratio_max": totals["ratio_max"],
            "actor/ratio_first": totals["ratio_first"],
        }
    if "ref_kl" in totals:
        metrics["actor/kl_loss"] = totals["ref_kl"] / tokens
    if "mismatch_abs" in totals:
        metrics |= {f"rollout/{name}": totals[name] for name in ("mismatch_abs", "mismatch_max", "mismatch_kl")}
    return metrics


def mean_and_variance(sums: Sequence[float]) -> tuple[float, float]:
    """From count, sum and sum of squares."""
    count, total, squares = max(1.0, sums[0]), sums[1], sums[2]
    mean = total / count
    return mean, max(0.0, squares / count - mean * mean)
