"""The moment of plain text: before each PPO step the batch gets the rows of its pre-training loss.

Knows a loader; what is learned from the rows is the module's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.data.datamodule import RLHFData
from rlhf.types import PromptBatch, TextBatch


class PlainText(Callback):
    """Fills `batch.plain` for the training step."""

    def __init__(self, data: RLHFData, rows: int) -> None:
        """
        Args:
            rows: of an iteration, over all ranks.

        Raises:
            UserError: `data.ptx` names no usable text.
        """
        self.data, self.rows = data, rows
        data.ptx_dataloader(rows)  # refuses what cannot be read before a network is built
        self.batches: Iterator[Any] = iter(())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed, which would move a resumed run's random state
            self.batches = iter(self.data.ptx_dataloader(self.rows))  # from where the prompts begin

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int) -> None:
        plain: TextBatch = next(self.batches)
        batch.plain = plain
