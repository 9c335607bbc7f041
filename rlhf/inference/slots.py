"""The state of the sequences being answered, one slot each: tensors that a decode step reads and writes in place.

S slots and one more, which idle rows of a step write to; A the largest number of answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.inference.arena import Specs


@dataclass
class Slots:
    tokens: Tensor  # (S + 1,) int64, the last token, not yet in the cache
    lengths: Tensor  # (S + 1,) int64, tokens in the cache
    counts: Tensor  # (S + 1,) int64, answer tokens drawn so far
    limits: Tensor  # (S + 1,) int64, answer tokens to draw at most
    sequences: Tensor  # (S + 1,) int64, number of the sequence in the rollout
    finished: Tensor  # (S + 1,) bool
    answers: Tensor  # (S + 1, A) int64
    logprobs: Tensor  # (S + 1, A) fp32
    rows: Tensor  # (S,) int64, slot of each row of a step
    seed: Tensor  # (1,) int64

    @classmethod
    def empty(cls, slots: int, new_tokens: int, device: torch.device) -> Slots:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        n = slots + 1
        return cls(
            tokens=zeros(n), lengths=zeros(n), counts=zeros(n), limits=zeros(n), sequences=zeros(n),
            finished=torch.ones(n, dtype=torch.bool, device=device), answers=zeros(n, new_tokens),
            logprobs=zeros(n, new_tokens, dtype=torch.float32), rows=zeros(slots), seed=zeros(1),
        )  # fmt: skip


def cache_specs(*, slots: int, tokens: int, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Specs:
    """Keys and values: one tensor each, (layers, slots + 1, kv_heads, tokens, head_dim)."""
    shape = (layers, slots + 1, kv_heads, tokens, head_dim)
    return {"keys": (shape, dtype), "values": (shape, dtype)}
