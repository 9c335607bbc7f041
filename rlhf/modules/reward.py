"""Step 2: the reward model learns which of two answers people prefer.

Knows the pairwise loss; knows no engine beyond `backward` and `step`, and no data set.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlhf.algorithms.losses import end_scores, pairwise_end_loss, pairwise_token_loss
from rlhf.models.factory import Blueprint
from rlhf.modules.base import RoleModule, as_scalars, step_metrics
from rlhf.modules.heads import restart_head
from rlhf.settings import RewardTrainingConfig
from rlhf.types import PairBatch


class RewardModel(RoleModule):
    """Bradley-Terry loss on pairs (Ouyang et al. 2022, eq. 1), averaged over the global batch."""

    judges_batches: ClassVar[bool] = True
    trained: ClassVar[tuple[str, ...]] = ("reward",)

    def __init__(self, rm: RewardTrainingConfig, blueprints: dict[str, Blueprint]) -> None:
        super().__init__(blueprints)
        self.rm = rm

    def configure_model(self) -> None:
        super().configure_model()
        if self.rm.head_init != "normal":
            restart_head(self, "reward", self.rm.head_init)

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        with self.clock("train"):
            totals: dict[str, Tensor] = {}
            for micro in batch.micro_batches(self.rm.micro_batch_size or len(batch)):
                sums = self._judge(micro)
                self.strategy.backward("reward", sums["loss"] / self.rm.batch_size)
                results = self.strategy.step("reward")
                totals = {name: totals.get(name, 0) + value.detach().double() for name, value in sums.items()}
            values = self.strategy.sum_over_ranks(torch.stack(list(totals.values())))
            seen = as_scalars(dict(zip(totals, values, strict=True)))
        self.iteration += 1
        self.tokens = {"train": int(batch.chosen_mask.sum() + batch.rejected_mask.sum())}
        train = {f"reward/train_{name.split('/')[1]}": value for name, value in self.summarize(seen).items()}
        self.metrics = {"reward/loss": seen["loss"] / self.rm.batch_size, **train, **step_metrics(results)}

    def _judge(self, batch: PairBatch) -> dict[str, Tensor]:
        """Sums over the pairs of a batch. Both answers go through the model in one forward pass."""
        ids = torch.cat([batch.chosen_ids, batch.rejected_ids])  # (2B, T)
        mask = torch.cat([batch.chosen_mask, batch.rejected_mask])  # (2B, T)
        values = self.reward(ids, mask)  # (2B, T)
        chosen, rejected = end_scores(values, mask).chunk(2)  # (B,), (B,)
        if self.rm.loss == "tokens":
            better, worse = values.chunk(2)
            loss = pairwise_token_loss(better, worse, batch.chosen_ids, batch.rejected_ids, batch.chosen_mask, batch.rejected_mask)  # (B,)
        else:
            loss = pairwise_end_loss(chosen, rejected)  # (B,)
        return {
            "loss": loss.sum(),
            "pairs": torch.tensor(float(len(loss)), device=loss.device),
            "right": (chosen > rejected).double().sum(),
            "chosen": chosen.double().sum(),
            "rejected": rejected.double().sum(),
        }

    def evaluate_batch(self, batch: PairBatch) -> dict[str, Tensor]:
        return self._judge(batch)

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        pairs = max(1.0, sums["pairs"])
        return {
            "reward/eval_loss": sums["loss"] / pairs,
            "reward/accuracy": sums["right"] / pairs,
            "reward/chosen_score": sums["chosen"] / pairs,
            "reward/rejected_score": sums["rejected"] / pairs,
        }
