"""PPO without a critic: the baseline of an answer is what other answers got.

The special case of `ppo.advantage` other than gae; everything else is PPO's. B sequences of this rank, A answer tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlhf.algorithms.advantages import group_normalized, leave_one_out, rewards_to_go
from rlhf.modules.ppo import PPO
from rlhf.types import Experience


class CriticFree(PPO):
    """RLOO, GRPO and REINFORCE++: the clipped policy loss with other advantages. All answers to a prompt are on one rank."""

    trained: ClassVar[tuple[str, ...]] = ("actor",)

    def _values(self, ids: Tensor, mask: Tensor, width: int) -> Tensor:
        return torch.zeros(len(ids), width, device=ids.device)

    def _advantages(self, rewards: Tensor, values: Tensor, rewarded: Tensor) -> tuple[Tensor, Tensor]:
        returns = rewards_to_go(rewards, rewarded, gamma=self.ppo.gamma)  # (B, A)
        if self.ppo.advantage == "reinforce_pp":
            return returns, returns
        whole, samples = torch.where(rewarded, rewards, 0).sum(dim=1), self.ppo.samples_per_prompt  # (B,)
        if self.ppo.advantage == "rloo":
            advantages = leave_one_out(whole, samples)
        else:
            advantages = group_normalized(whole, samples, unbiased=self.ppo.whiten_unbiased)
        return torch.where(rewarded, advantages[:, None], 0), returns

    def _learn_values(self, batch: Experience, weights: Tensor) -> dict[str, Tensor]:
        return {}
