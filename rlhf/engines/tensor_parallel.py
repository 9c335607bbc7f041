"""Tensor-parallel groups of a rollout: neighbouring ranks put their prompts together and each takes its own answers back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.config import UserError
from rlhf.engines.strategy import RoleStrategy
from rlhf.inference.generate import Answers
from rlhf.inference.parallel import Parallel
from rlhf.types import PromptBatch


def tensor_parallel_group(strategy: RoleStrategy, size: int) -> Parallel:
    """This rank's group of `size` neighbours. Collective if size is above 1.

    Raises:
        UserError: the ranks do not divide into such groups.
    """
    rank, world = strategy.global_rank, strategy.world_size
    if world % size:
        raise UserError(f"tp.size={size} does not divide the number of ranks = {world}: choose a divisor of {world}")
    if size == 1:
        return Parallel()
    groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]  # every rank makes all of them
    return Parallel(rank % size, size, groups[rank // size])


@dataclass
class Share:
    """The prompts that a group answers together, in the order of its ranks."""

    prompts: list[list[int]]
    """M token lists without padding."""
    limits: list[int]
    """Answer tokens of each sequence; sequence s * M + i answers prompt i."""
    sequences: list[int]
    """Number of each sequence in the whole batch, which its random numbers come from."""
    first: int
    """The first of this rank's prompts."""
    count: int
    """Of this rank's prompts."""

    @classmethod
    def of(cls, strategy: RoleStrategy, parallel: Parallel, prompts: PromptBatch, samples: int, limits: Tensor | None, most: int) -> Share:
        """
        Args:
            limits: (samples * B,) int64, or None for `most` each.
        """
        rank, world = strategy.global_rank, strategy.world_size
        ids = [row[mask].tolist() for row, mask in zip(prompts.ids.cpu(), prompts.mask.cpu(), strict=True)]
        own = [most] * (samples * len(ids)) if limits is None else limits.tolist()
        rows = [b * world + rank for b in range(len(ids))]  # of the whole batch
        parts = [(ids, own, rows)]
        if parallel.size > 1:
            parts = [([], [], [])] * parallel.size
            dist.all_gather_object(parts, (ids, own, rows), group=parallel.group)
        sizes = [len(part[0]) for part in parts]
        by_sample = [[part[1][s * n : (s + 1) * n] for part, n in zip(parts, sizes, strict=True)] for s in range(samples)]
        return cls(
            prompts=[prompt for part in parts for prompt in part[0]],
            limits=[limit for parts_of_sample in by_sample for part in parts_of_sample for limit in part],
            sequences=[row * samples + s for s in range(samples) for part in parts for row in part[2]],
            first=sum(sizes[: parallel.rank]),
            count=len(ids),
        )


def own_rows(answers: Answers, share: Share, samples: int) -> Answers:
    """This rank's rows of its group's answers, sample-major."""
    total = len(share.prompts)
    rows = torch.tensor([s * total + share.first + i for s in range(samples) for i in range(share.count)], device=answers.counts.device)
    return Answers(answers.tokens[rows], answers.logprobs[rows], answers.counts[rows])
