"""Tensor parallelism of the decoder: which slice of the heads and of the MLP is this rank's, and the sum that puts it together.

Knows torch.distributed; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Parallel:
    """A group of ranks that hold one decoder together; of one rank: nothing to do.

    Heads and the width of the MLP are split (Shoeybi et al. 2019, arXiv 1909.08053, section 3); embedding, head and norms are whole on
    every rank.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def share(self, total: int) -> slice:
        """This rank's part of a dimension."""
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, x: Tensor) -> Tensor:
        """Any shape -> the same, summed over the group, in place. Every rank gets the same bits, so that all draw the same tokens."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x
