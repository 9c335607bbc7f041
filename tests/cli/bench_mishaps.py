"""What may go wrong while a step is measured, as callbacks for `+callbacks.x._target_=`. Run inside the ranks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback


class NoMemory(Callback):
    """The device is full when iteration number `batch` has its answers."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
