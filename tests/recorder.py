"""A callback that keeps the actor's whole weights after every iteration, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback


class RecordWeights(Callback):
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._save(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: Any, pl_module: Any) -> None:
        with pl_module.strategy.whole("actor") as network:
            weights = {name: p.detach().clone() for name, p in network.model.named_parameters()}
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(weights, self.folder / f"weights-{pl_module.iteration:03d}.pt")
