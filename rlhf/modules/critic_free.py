"""PPO without a critic: the baseline of an answer is what other answers got, or what an estimator of the user's makes of them.

The special case of `ppo.advantage` other than gae; everything else is PPO's. B sequences of this rank, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf.algorithms.advantages import group_normalized, leave_one_out, rewards_to_go
from rlhf.config import UserError, locate
from rlhf.modules.ppo import PPO
from rlhf.settings.ppo import ESTIMATORS
from rlhf.types import Experience

Estimator = Callable[[Tensor, Tensor, int], Tensor]
"""Rewards (B, A) fp32, zero beyond an answer; mask (B, A) bool, true on what is rewarded; answers to a prompt, row s * B / samples + b
answering prompt b -> advantages (B, A). It sees this rank's answers, and all that a prompt has."""


class CriticFree(PPO):
    """RLOO, GRPO, REINFORCE++ and estimators of the user's: the clipped policy loss with other advantages. All answers to a prompt are on
    one rank."""

    trained: ClassVar[tuple[str, ...]] = ("actor",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.estimator: Estimator | None = None if self.ppo.advantage in ESTIMATORS else locate(self.ppo.advantage)

    def _values(self, ids: Tensor, mask: Tensor, width: int) -> Tensor:
        return torch.zeros(len(ids), width, device=ids.device)

    def _advantages(self, rewards: Tensor, values: Tensor, rewarded: Tensor) -> tuple[Tensor, Tensor]:
        returns = rewards_to_go(rewards, rewarded, gamma=self.ppo.gamma)  # (B, A)
        if self.ppo.advantage == "reinforce_pp":
            return returns, returns
        samples = self.ppo.samples_per_prompt
        if self.estimator is not None:
            with self.strategy.together():
                return estimated(self.ppo.advantage, self.estimator, torch.where(rewarded, rewards, 0), rewarded, samples), returns
        whole = torch.where(rewarded, rewards, 0).sum(dim=1)  # (B,)
        if self.ppo.advantage == "rloo":
            advantages = leave_one_out(whole, samples)
        else:
            advantages = group_normalized(whole, samples, unbiased=self.ppo.whiten_unbiased)
        return torch.where(rewarded, advantages[:, None], 0), returns

    def _learn_values(self, batch: Experience, weights: Tensor) -> dict[str, Tensor]:
        return {}


@torch.no_grad()
def estimated(path: str, estimator: Estimator, rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    """What an estimator says of an iteration's answers. (B, A) each -> (B, A) fp32, zero beyond the answer

    Args:
        path: of the estimator, for messages.

    Raises:
        UserError: it raises, or returns anything but a finite number for each token.
    """
    try:
        advantages: Any = estimator(rewards.clone(), mask.clone(), samples)
    except Exception as error:
        raise UserError(f"ppo.advantage={path} raised {type(error).__name__}: {error}, for rewards {tuple(rewards.shape)}") from error
    if not isinstance(advantages, Tensor) or advantages.shape != rewards.shape:
        got = f"shape {tuple(advantages.shape)}" if isinstance(advantages, Tensor) else f"a {type(advantages).__name__}"
        raise UserError(f"ppo.advantage={path} returned {got}: it must return a tensor like the rewards, {tuple(rewards.shape)}")
    advantages = torch.where(mask, advantages.to(rewards), 0)
    if not bool(advantages.isfinite().all()):
        raise UserError(f"ppo.advantage={path} returned advantages that are not finite: it must return a finite number for each token")
    return advantages
