"""Step 2 and 3 in one: the actor learns from pairs, against a frozen copy of where it started.

Knows which log-probabilities the loss takes; knows no engine beyond `backward` and `step`, and no data set. B pairs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from rlhf.algorithms.logprobs import token_logprobs
from rlhf.algorithms.preference import answer_logprobs, answer_masks, drift, preference_loss, right_pairs
from rlhf.models.factory import Blueprint
from rlhf.modules.base import RoleModule, as_scalars, step_metrics
from rlhf.settings import DPOConfig
from rlhf.types import PairBatch


class DPO(RoleModule):
    """Direct preference optimization, averaged over the pairs of the global batch, so that micro-batches and ranks change nothing."""

    judges_batches: ClassVar[bool] = True
    trained: ClassVar[tuple[str, ...]] = ("actor",)

    def __init__(self, dpo: DPOConfig, blueprints: dict[str, Blueprint]) -> None:
        """
        Args:
            blueprints: of `actor` and of `ref`, which should start from the same weights; without a `ref` the actor minus its adapters is it.
        """
        super().__init__(blueprints)
        self.dpo, self.micro_batch_size = dpo, dpo.micro_batch_size

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        with self.clock("train"):
            totals: dict[str, Tensor] = {}
            for micro in self.passes(batch):
                sums = self._judge(micro)
                self.strategy.backward("actor", sums["loss"] / self.dpo.batch_size)
                results = self.strategy.step("actor")
                totals = {name: totals.get(name, 0) + value.detach().double() for name, value in sums.items()}
            values = self.strategy.sum_over_ranks(torch.stack(list(totals.values())))
            seen = _means(as_scalars(dict(zip(totals, values, strict=True))))
        self.iteration += 1
        self.tokens = {"train": int(batch.chosen_mask.sum() + batch.rejected_mask.sum())}
        loss = {"dpo/loss": seen.pop("loss")}
        self.metrics = loss | {f"dpo/train_{name}": value for name, value in seen.items()} | step_metrics(results)

    def _judge(self, batch: PairBatch) -> dict[str, Tensor]:
        """Sums over the pairs of a batch. Both answers go through each model in one forward pass."""
        ids = torch.cat([batch.chosen_ids, batch.rejected_ids])  # (2B, T)
        mask = torch.cat([batch.chosen_mask, batch.rejected_mask])  # (2B, T)
        answers = torch.cat(answer_masks(batch.chosen_ids, batch.rejected_ids, batch.chosen_mask, batch.rejected_mask))  # (2B, T)
        width = _answer_width(answers)  # A: columns before the first answer token of the batch need no logits, the largest tensor here
        answers = answers[:, -width:]  # (2B, A)
        # The reference first: it may be the actor itself, whose backward pass should follow its own forward pass.
        ref_logprobs = self._logprobs(self.reference, ids, mask, width)  # (2B, A)
        logprobs = self._logprobs(self.actor, ids, mask, width)  # (2B, A)
        average = self.dpo.loss == "ipo"
        policy = answer_logprobs(logprobs, answers, average=average)  # (2B,)
        ref = answer_logprobs(ref_logprobs, answers, average=average)  # (2B,)
        result = preference_loss(
            *policy.chunk(2), *ref.chunk(2), kind=self.dpo.loss, beta=self.dpo.beta, label_smoothing=self.dpo.label_smoothing
        )
        chosen, rejected = answer_logprobs(logprobs.detach(), answers, average=False).chunk(2)  # (B,), (B,)
        return {
            "loss": result.loss.sum(),
            "pairs": torch.tensor(float(len(result.loss)), device=ids.device),
            "tokens": answers.sum(),
            "right": right_pairs(result.chosen_reward, result.rejected_reward).sum(),
            "chosen_reward": result.chosen_reward.sum(),
            "rejected_reward": result.rejected_reward.sum(),
            "chosen_logprob": chosen.sum(),
            "rejected_logprob": rejected.sum(),
            "drift": drift(logprobs, ref_logprobs, answers),
        }

    def _logprobs(self, network: Callable[..., Tensor], ids: Tensor, mask: Tensor, width: int) -> Tensor:
        """(2B, T), (2B, T) -> (2B, width): log-probability of each of the last `width` tokens, given what comes before it."""
        logits = network(ids, mask, last=width + 1)  # (2B, A + 1, V)
        # The last column is scored and dropped: cutting the logits would cost a padded copy in the backward pass.
        following = ids[:, -width - 1 :].roll(-1, dims=1)  # (2B, A + 1)
        return token_logprobs(logits, following)[:, :-1]

    def evaluate_batch(self, batch: PairBatch) -> dict[str, Tensor]:
        return self._judge(batch)

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        means = _means(sums)
        return {"dpo/eval_loss": means.pop("loss")} | {f"dpo/{name}": value for name, value in means.items()}


def _answer_width(answers: Tensor) -> int:
    """Columns from the first one with an answer token to the end, for a mask (2B, T) of answers. Column 0 is never one of them."""
    longest = answers.shape[1] - 1
    return max(1, min(longest, answers.shape[1] - int(answers.any(dim=0).int().argmax())))


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Metrics from sums over all ranks: by pair, and the drift by token."""
    pairs = max(1.0, sums["pairs"])
    names = ("loss", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob")
    means = {name: sums[name] / pairs for name in names}
    return means | {
        "accuracy": sums["right"] / pairs,
        "margin": means["chosen_reward"] - means["rejected_reward"],
        "drift": sums["drift"] / max(1.0, sums["tokens"]),
    }
