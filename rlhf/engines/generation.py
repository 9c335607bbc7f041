"""Answering prompts with transformers' `generate`: the plain rollout engine, and the oracle for faster ones.

Knows sampling and padding; knows no reward and no learning. B prompts, P prompt tokens, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.engines.strategy import RoleStrategy
from rlhf.settings import RolloutConfig
from rlhf.types import PromptBatch, Rollout


class RolloutEngine(Protocol):
    """What answers prompts. The hybrid engine and transformers' generate are interchangeable behind it."""

    def generate(self, role: str, prompts: PromptBatch, *, samples: int) -> Rollout:
        """Answers every prompt `samples` times with the role's current weights; collective under ZeRO-3."""
        ...


def answer_masks(answers: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
    """(B, A) ids -> (B, A) bool, (B,) bool: tokens up to and including the first end of turn, and whether there is one."""
    is_end = answers == end_id
    ends_before = is_end.long().cumsum(dim=1) - is_end.long()
    return ends_before == 0, is_end.any(dim=1)


class HFGenerate:
    """`model.generate` with a dynamic cache.

    Under ZeRO-3 DeepSpeed's hooks release and gather each layer as it runs, even inside `whole`: every step is collective, and a rank whose
    answers have ended goes on with the others until the longest answer of all ranks is there.
    """

    def __init__(self, strategy: RoleStrategy, rollout: RolloutConfig, *, end_id: int, pad_id: int) -> None:
        self.strategy = strategy
        self.rollout = rollout
        self.end_id = end_id
        self.pad_id = pad_id

    @torch.no_grad()
    def generate(self, role: str, prompts: PromptBatch, *, samples: int) -> Rollout:
        ids = prompts.ids.repeat(samples, 1)  # (samples * B, P), sample-major
        mask = prompts.mask.repeat(samples, 1)
        size = self.rollout.micro_batch_size or len(ids)
        with self.strategy.whole(role) as network:
            training = network.training
            network.eval()
            parts = [self._answers(network.model, ids[i : i + size], mask[i : i + size]) for i in range(0, len(ids), size)]
            network.train(training)
        width = max(part.shape[1] for part in parts)
        answers = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=self.pad_id) for part in parts])
        action_mask, ended = answer_masks(answers, self.end_id)
        answers = answers.masked_fill(~action_mask, self.pad_id)
        return Rollout(ids=torch.cat([ids, answers], 1), mask=torch.cat([mask, action_mask], 1), action_mask=action_mask, ended=ended)

    def _answers(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:  # (B, P), (B, P) -> (B, up to A)
        sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        greedy = self.rollout.temperature == 0
        sampling: dict[str, Any] = {"do_sample": not greedy}
        if not greedy:
            sampling |= {"temperature": self.rollout.temperature, "top_k": self.rollout.top_k, "top_p": self.rollout.top_p}
        with torch.autocast(ids.device.type, enabled=False):
            out = model.generate(
                input_ids=ids, attention_mask=mask.long(), max_new_tokens=self.rollout.max_new_tokens,
                min_new_tokens=self.rollout.min_new_tokens or None, eos_token_id=self.end_id, pad_token_id=self.pad_id,
                use_cache=True, synced_gpus=sharded and self.strategy.world_size > 1, **sampling,
            )  # fmt: skip
        return out[:, ids.shape[1] :]


class Recorded:
    """Plays back rollouts saved by a run with `rollout.save_to`, so that a learner can be tested alone.

    File `<n>.pt` holds iteration n's rollout of all ranks in global order; each rank takes its rows.
    """

    def __init__(self, strategy: RoleStrategy, load: Callable[[], Rollout]) -> None:
        self.strategy = strategy
        self.load = load

    def generate(self, role: str, prompts: PromptBatch, *, samples: int) -> Rollout:
        rollout = self.load()
        rank, world = self.strategy.global_rank, self.strategy.world_size
        index = torch.arange(rank, len(rollout), world)
        return rollout.rows(index).to(prompts.ids.device)
