"""What crosses from one room to the next, with its shapes.

Knows no model, no loss and no config. B sequences of this rank, P prompt tokens, A answer tokens, T = P + A.
Prompts are padded on the left and answers on the right, so position P is the first answer token of every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", "TextBatch", "PairBatch", "RankedBatch", "PromptBatch", "Rollout", "Experience")


class Rows:
    """Row-wise operations shared by the batches: every tensor has the batch as its first dimension."""

    def __len__(self) -> int:
        return next(len(getattr(self, f.name)) for f in fields(self) if isinstance(getattr(self, f.name), Tensor))  # type: ignore[arg-type]

    def map(self: Batch, f) -> Batch:  # type: ignore[misc]
        changed = {x.name: f(getattr(self, x.name)) for x in fields(self) if isinstance(getattr(self, x.name), Tensor)}
        return replace(self, **changed)  # type: ignore[arg-type]

    def to(self: Batch, device: torch.device | str) -> Batch:  # type: ignore[misc]
        return self.map(lambda t: t.to(device, non_blocking=True))

    def rows(self: Batch, index: Tensor | slice) -> Batch:  # type: ignore[misc]
        """The chosen rows, in that order. Lists (texts) follow the tensors."""
        chosen = self.map(lambda t: t[index])
        picked = index.tolist() if isinstance(index, Tensor) else range(len(self))[index]
        lists: dict[str, Any] = {
            x.name: [getattr(self, x.name)[i] for i in picked] for x in fields(self) if isinstance(getattr(self, x.name), list)
        }
        return replace(chosen, **lists)

    def micro_batches(self: Batch, size: int) -> Iterator[Batch]:  # type: ignore[misc]
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))


@dataclass(kw_only=True)
class TextBatch(Rows):
    """Conversations for SFT (and plain text for the pre-training loss), padded on the right."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, true on tokens
    loss_mask: Tensor  # (B, T) bool, true on the tokens to predict


@dataclass(kw_only=True)
class PairBatch(Rows):
    """One prompt with a better and a worse answer, each written out whole and padded on the right."""

    chosen_ids: Tensor  # (B, T) int64
    chosen_mask: Tensor  # (B, T) bool
    rejected_ids: Tensor  # (B, T) int64, same T
    rejected_mask: Tensor  # (B, T) bool


@dataclass(kw_only=True)
class RankedBatch(PairBatch):
    """One prompt with 2 to K ranked answers. `chosen` is the best and `rejected` the worst of them, so that it is a batch of pairs to those
    who look at pairs only. A row of fewer answers leaves slots in between empty."""

    between_ids: Tensor  # (B, K - 2, T) int64, best first
    between_mask: Tensor  # (B, K - 2, T) bool
    ranks: Tensor  # (B, K) int64 of chosen, between and rejected: smaller is better, equal is a tie, -1 is an empty slot


@dataclass(kw_only=True)
class PromptBatch(Rows):
    """Prompts to answer, padded on the left. Callbacks fill `rollout`, and `plain` where there is a pre-training loss, before the step."""

    ids: Tensor  # (B, P) int64
    mask: Tensor  # (B, P) bool
    index: Tensor  # (B,) int64, the row's number in the data set
    texts: list[str]  # B prompts as text
    rollout: Rollout | None = None
    plain: TextBatch | None = None
    """Plain text for all optimizer steps of the iteration."""


@dataclass(kw_only=True)
class Rollout(Rows):
    """Sampled answers. With n samples a prompt, row s * B + b answers prompt b (sample-major)."""

    ids: Tensor  # (B, P + A) int64
    mask: Tensor  # (B, P + A) bool: prompt and answer tokens, the end-of-turn token included
    action_mask: Tensor  # (B, A) bool: answer tokens, the end-of-turn token included
    ended: Tensor  # (B,) bool: the answer closed with an end-of-turn token
    logprobs: Tensor | None = None  # (B, A) fp32 of the sampled tokens, where the engine returns them

    @property
    def prompt_length(self) -> int:
        """P, the column of the first answer token."""
        return self.ids.shape[1] - self.action_mask.shape[1]

    @property
    def lengths(self) -> Tensor:
        """(B,) answer tokens of each row."""
        return self.action_mask.sum(dim=1)


@dataclass(kw_only=True)
class Experience(Rows):
    """A scored rollout: all that the losses need. fp32 unless said otherwise; zero where the mask is false."""

    ids: Tensor  # (B, P + A) int64
    mask: Tensor  # (B, P + A) bool
    action_mask: Tensor  # (B, A) bool: the tokens that the losses look at
    logprobs: Tensor  # (B, A) that the policy's ratio is taken against: the actor's before its first update, or the sampler's
    values: Tensor  # (B, A) before each answer token
    advantages: Tensor  # (B, A)
    returns: Tensor  # (B, A)
    ref_logprobs: Tensor | None = None  # (B, A) of the reference, where the loss has a KL penalty
    importance: Tensor | None = None  # (B, A) factor of each token's policy loss, where the sampler is corrected for
