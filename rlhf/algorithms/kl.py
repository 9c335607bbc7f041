"""How far the policy is from its reference, and how hard it is pulled back.

Knows neither models nor rewards: log-probabilities in, a penalty or a coefficient out.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ERROR = 0.2
"""Bound on the relative error that one update of the adaptive controller reacts to (Ziegler et al. 2019, section 2.2)."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, *, clamp: float | None = None) -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token alone.

    With d = logprobs - ref_logprobs: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, low variance),
    k3 = exp(-d) - 1 + d (unbiased, never negative). Source: Schulman 2020, "Approximating KL Divergence".

    Args:
        logprobs: (B, A) of the tokens under the policy that sampled them.
        ref_logprobs: (B, A) of the same tokens under the reference.
        estimator: k1, k2 or k3.
        clamp: bound on |d| (OpenRLHF bounds the estimate itself). None: off.

    Returns:
        (B, A), differentiable.

    Raises:
        ValueError: another estimator.
    """
    difference = logprobs - ref_logprobs  # (B, A)
    if clamp is not None:
        difference = difference.clamp(-clamp, clamp)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimator must be k1, k2 or k3, got {estimator}")


class FixedKL:
    """A coefficient that stays what the configuration says, also after a resume."""

    def __init__(self, coef: float) -> None:
        self.value = coef

    def update(self, kl: float, sequences: int) -> None:
        """Takes what `AdaptiveKL` takes, and leaves the coefficient alone."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to restore: the configuration decides."""


class AdaptiveKL:
    """A coefficient that rises while the KL is above `target` and falls while it is below.

    Proportional control in log space: value *= 1 + clip(kl / target - 1, -0.2, 0.2) * sequences / horizon
    (Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2). An update of more sequences than the
    horizon counts as one horizon: beyond five of them the paper's formula would turn the coefficient negative.
    """

    def __init__(self, coef: float, *, target: float, horizon: int) -> None:
        self.value = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, sequences: int) -> None:
        """`kl`: mean KL of a sequence (summed over its tokens) in the last iteration; `sequences`: how many that were, over all ranks."""
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.value *= 1 + error * min(sequences / self.horizon, 1)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


def kl_controller(coef: float, target: float | None, horizon: int) -> FixedKL | AdaptiveKL:
    """The controller that steers to `target`, or the constant one where there is no target."""
    return FixedKL(coef) if target is None else AdaptiveKL(coef, target=target, horizon=horizon)
