"""Step 1: supervised fine-tuning of the actor on demonstrations.

Knows the loss; knows no engine beyond `backward` and `step`, and no data set.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from rlhf.algorithms.losses import sft_loss
from rlhf.models.factory import Blueprint
from rlhf.modules.base import RoleModule, as_scalars, step_metrics
from rlhf.settings import SFTConfig
from rlhf.types import TextBatch


class SFT(RoleModule):
    """Next-token loss, averaged over all tokens of the global batch, so that the split into micro-batches and ranks changes nothing."""

    judges_batches: ClassVar[bool] = True
    trained: ClassVar[tuple[str, ...]] = ("actor",)

    def __init__(self, sft: SFTConfig, blueprints: dict[str, Blueprint]) -> None:
        super().__init__(blueprints)
        self.sft, self.micro_batch_size = sft, sft.micro_batch_size

    def training_step(self, batch: TextBatch, batch_idx: int) -> None:
        with self.clock("train"):
            tokens = self.strategy.sum_over_ranks(batch.loss_mask[:, 1:].sum().double())
            loss = torch.zeros((), dtype=torch.float64, device=self.device)
            for micro in self.passes(batch):
                share = self._token_losses(micro).sum() / tokens
                self.strategy.backward("actor", share)
                results = self.strategy.step("actor")
                loss += share.detach()
            sums = as_scalars({"loss": self.strategy.sum_over_ranks(loss), "tokens": tokens})
        self.iteration += 1
        self.tokens = {"train": int(batch.mask.sum())}
        self.metrics = {"sft/loss": sums["loss"], "sft/tokens": sums["tokens"], **step_metrics(results)}

    def _token_losses(self, batch: TextBatch) -> Tensor:  # (B, T - 1)
        return sft_loss(self.actor(batch.ids, batch.mask), batch.ids, batch.loss_mask)

    def evaluate_batch(self, batch: TextBatch) -> dict[str, Tensor]:
        return {"loss": self._token_losses(batch).sum(), "tokens": batch.loss_mask[:, 1:].sum()}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """Perplexity is exp of the mean loss over all held-out tokens."""
        loss = sums["loss"] / max(1.0, sums["tokens"])
        return {"sft/eval_loss": loss, "sft/perplexity": math.exp(min(loss, 700.0))}
