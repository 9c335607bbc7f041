"""Step 2: the reward model learns which of two or more answers people prefer.

Knows the pairwise loss; knows no engine beyond `backward` and `step`, and no data set.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlhf.algorithms.losses import comparisons, end_scores, pairwise_end_loss, pairwise_token_loss
from rlhf.models.factory import Blueprint
from rlhf.modules.base import RoleModule, as_scalars, step_metrics
from rlhf.modules.heads import restart_head
from rlhf.settings import RewardTrainingConfig
from rlhf.types import PairBatch, RankedBatch


class RewardModel(RoleModule):
    """Bradley-Terry loss (Ouyang et al. 2022, eq. 1): the mean over the comparisons of a prompt, averaged over the prompts of the global
    batch. A pair is a prompt with one comparison."""

    judges_batches: ClassVar[bool] = True
    trained: ClassVar[tuple[str, ...]] = ("reward",)

    def __init__(self, rm: RewardTrainingConfig, blueprints: dict[str, Blueprint]) -> None:
        super().__init__(blueprints)
        self.rm, self.micro_batch_size = rm, rm.micro_batch_size

    def configure_model(self) -> None:
        super().configure_model()
        if self.rm.head_init != "normal":
            restart_head(self, "reward", self.rm.head_init)

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        with self.clock("train"):
            totals: dict[str, Tensor] = {}
            for micro in self.passes(batch):
                sums = self._judge(micro)
                self.strategy.backward("reward", sums["loss"] / self.rm.batch_size)
                results = self.strategy.step("reward")
                totals = {name: totals.get(name, 0) + value.detach().double() for name, value in sums.items()}
            values = self.strategy.sum_over_ranks(torch.stack(list(totals.values())))
            seen = as_scalars(dict(zip(totals, values, strict=True)))
        self.iteration += 1
        self.tokens = {"train": int(every_answer(batch)[1].sum())}
        train = {f"reward/train_{name.split('/')[1]}": value for name, value in self.summarize(seen).items()}
        self.metrics = {"reward/loss": seen["loss"] / self.rm.batch_size, **train, **step_metrics(results)}

    def _judge(self, batch: PairBatch) -> dict[str, Tensor]:
        """Sums over the prompts of a batch, and over their comparisons. All N answers go through the model once, in one forward pass."""
        ids, mask, ranks = every_answer(batch)  # (N, T), (N, T), (B, K)
        values = self.reward(ids, mask)  # (N, T)
        scores = end_scores(values, mask)  # (N,)
        better, worse, weight = comparisons(ranks)  # (C,), (C,), (C,)
        if self.rm.loss == "tokens":
            loss = pairwise_token_loss(values[better], values[worse], ids[better], ids[worse], mask[better], mask[worse])  # (C,)
        else:
            loss = pairwise_end_loss(scores[better], scores[worse])  # (C,)
        count = {"prompts": float(len(ranks)), "pairs": float(len(loss))}
        return {
            "loss": (loss * weight).sum(),
            **{name: torch.tensor(value, device=loss.device) for name, value in count.items()},
            "right": (scores[better] > scores[worse]).double().sum(),
            "chosen": scores[: len(ranks)].double().sum(),  # the first of each prompt, the best
            "rejected": scores[-len(ranks) :].double().sum(),  # the last of each prompt, the worst
        }

    def evaluate_batch(self, batch: PairBatch) -> dict[str, Tensor]:
        return self._judge(batch)

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        prompts = max(1.0, sums["prompts"])
        return {
            "reward/eval_loss": sums["loss"] / prompts,
            "reward/accuracy": sums["right"] / max(1.0, sums["pairs"]),
            "reward/chosen_score": sums["chosen"] / prompts,
            "reward/rejected_score": sums["rejected"] / prompts,
        }


def every_answer(batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The N answers of a batch as rows of one forward pass: the best one of each prompt, then those between, the worst ones last.

    Returns:
        ids (N, T), mask (N, T), and ranks (B, K): -1 where a prompt has fewer than K answers.
    """
    ids = torch.cat([batch.chosen_ids, batch.rejected_ids])  # (2B, T)
    mask = torch.cat([batch.chosen_mask, batch.rejected_mask])  # (2B, T)
    pairs = len(batch)
    if not isinstance(batch, RankedBatch):
        return ids, mask, torch.tensor([[0, 1]], device=ids.device).expand(pairs, 2)
    there = (batch.ranks[:, 1:-1] >= 0).T  # (K - 2, B)
    ids = torch.cat([ids[:pairs], batch.between_ids.transpose(0, 1)[there], ids[pairs:]])  # (N, T)
    mask = torch.cat([mask[:pairs], batch.between_mask.transpose(0, 1)[there], mask[pairs:]])  # (N, T)
    return ids, mask, batch.ranks
