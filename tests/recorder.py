"""A callback that keeps the actor's whole weights after every iteration, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from lightning.pytorch import Callback
from torch import Tensor


def current(parameter: Any) -> Tensor:
    """The weight as the optimizer has it. Nothing is made whole for it and released: that would hide what a run without this callback does."""
    weight = safe_get_full_fp32_param(parameter) if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") else parameter.data
    return weight.detach().cpu().clone().view(getattr(parameter, "ds_shape", parameter.shape))


class RecordWeights(Callback):
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._save(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: Any, pl_module: Any) -> None:
        weights = {name: current(p) for name, p in pl_module.strategy.network("actor").model.named_parameters()}
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(weights, self.folder / f"weights-{pl_module.iteration:03d}.pt")
