"""Which rows make up batch k: a function of a seed and a few sizes, the same for every number of ranks.

Knows only row numbers and lengths. One pass goes over all epochs, so that resuming needs a single number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from torch.utils.data import Sampler

from rlhf.config import UserError
from rlhf.data.split import generator

WINDOW = 50
"""Batches among which rows are exchanged to bring equal lengths together: enough to save most padding, too few to order an epoch."""


class GlobalBatches(Sampler[list[int]]):
    """Yields the row numbers of this rank, batch by batch.

    Epoch e runs through its own permutation, drawn with (seed, e). What is left of an epoch begins the next epoch's first batch; what is
    left at the very end is dropped. Global batch k has the same rows for every world size; rank r takes elements r, r + world, ...

    `start` skips so many batches (resuming); `len()` stays the total.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        epochs: float,
        seed: int,
        steps: int | None = None,
        rank: int = 0,
        world: int = 1,
        lengths: Sequence[int] | None = None,
        key: str = "batch_size",
    ) -> None:
        """
        Args:
            batch_size: rows of a global batch.
            epochs: passes over the rows; 1.5 uses half of the second permutation.
            steps: exactly so many batches, over as many epochs as they take; None: as many as `epochs` gives.
            lengths: token counts; given, rows of similar length share a batch (within windows of WINDOW batches, which are then shuffled).
            key: the configuration key of the batch size, for messages.

        Raises:
            UserError: the batch does not divide by the ranks, or there are too few rows for one batch.
        """
        if batch_size % world:
            raise UserError(f"{key}={batch_size} does not divide by the number of ranks = {world}: choose a multiple of {world}")
        available = int(Fraction(str(epochs)) * rows) // batch_size  # exact: 0.1 * 30 rows are 3, not 2.999
        if rows == 0 or (steps is None and available == 0):
            raise UserError(f"{key}={batch_size} passes the {rows} rows there are in {epochs:g} epochs: lower it or add data")
        self.rows, self.batch_size, self.seed, self.rank, self.world = rows, batch_size, seed, rank, world
        self.steps = available if steps is None else steps
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(self.start, self.steps):
            yield self.batch(k)[self.rank :: self.world].tolist()

    def batch(self, k: int) -> np.ndarray:
        """Row numbers of global batch k, over all ranks. (batch_size,) int64"""
        if self.lengths is None:
            return self._stream(k * self.batch_size, (k + 1) * self.batch_size)
        window, place = divmod(k, WINDOW)
        return self._window(window)[place]

    def _stream(self, start: int, stop: int) -> np.ndarray:
        """Elements start..stop-1 of all epochs' permutations laid end to end."""
        first, last = start // self.rows, (stop - 1) // self.rows
        epochs = np.concatenate([self._permutation(epoch) for epoch in range(first, last + 1)])
        return epochs[start - first * self.rows : stop - first * self.rows]

    @functools.lru_cache(maxsize=4)  # noqa: B019 (a sampler lives as long as its run)
    def _permutation(self, epoch: int) -> np.ndarray:
        return generator("epoch", self.seed, epoch).permutation(self.rows)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _window(self, window: int) -> np.ndarray:
        """The batches of one window, by length and then shuffled. (batches, batch_size) int64"""
        assert self.lengths is not None
        first = window * WINDOW
        batches = min(WINDOW, self.steps - first)
        rows = self._stream(first * self.batch_size, (first + batches) * self.batch_size)
        rows = rows[np.argsort(self.lengths[rows], kind="stable")].reshape(batches, self.batch_size)
        return rows[generator("window", self.seed, window).permutation(batches)]


class EvalBatches(Sampler[list[int]]):
    """The first rows in order, each once. Only when the ranks cannot share the last batch evenly are up to world - 1 rows left out."""

    def __init__(self, rows: int, batch_size: int, *, max_batches: int | None = None, rank: int = 0, world: int = 1) -> None:
        size = max(batch_size // world, 1) * world
        used = rows if max_batches is None else min(rows, max_batches * size)
        self.rows, self.size, self.rank, self.world = used - used % world, size, rank, world

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, self.rows, self.size):
            yield list(range(first, min(first + self.size, self.rows)))[self.rank :: self.world]
