"""Which rows make up each minibatch, so that the global minibatch is the same set however many ranks share it.

Knows indices only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def minibatch_rows(
    rows: int, size: int, *, rank: int, world_size: int, seed: int, shuffle: str = "rows", first_pass: bool = True
) -> list[Tensor]:  # fmt: skip
    """This rank's local row numbers in each global minibatch of one pass.

    Global row g lives on rank g % world_size as local row g // world_size. The rows are laid out in a table of `rows / size` lines and
    `size` columns, and each column is shuffled by itself: minibatch j takes line j. Each minibatch then holds one row of every column,
    hence as many rows of each rank, and nothing in it depends on the number of ranks.

    Args:
        rows: sequences over all ranks.
        size: sequences of one minibatch over all ranks; divides `rows`, and `world_size` divides it.
        seed: the same on every rank.
        shuffle: rows, as above; minibatches, where minibatch j takes line j of the table as it is, and only the order of the minibatches
            is drawn, in all passes but the first (DeepSpeed-Chat); none, neither.
        first_pass: over these rows.

    Returns:
        `rows / size` tensors, each (size / world_size,) int64.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    if shuffle == "rows":
        lines = torch.rand(rows // size, size, generator=generator, dtype=torch.float64).argsort(dim=0)  # (rows / size, size)
    else:
        moves = shuffle == "minibatches" and not first_pass
        order = torch.randperm(rows // size, generator=generator) if moves else torch.arange(rows // size)
        lines = order[:, None].expand(-1, size)
    table = lines * size + torch.arange(size)
    return [line[rank::world_size] // world_size for line in table]
