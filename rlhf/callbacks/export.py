"""The moment of an export: once training has ended, in HF layout.

Knows when and where; how a network is written is `rlhf.models.export`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.models.export import export_network
from rlhf.modules.base import RoleModule


class Export(Callback):
    """Writes every trained role to `<folder>/<role>`; a run that was stopped by Ctrl-C exports nothing."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder = folder
        self.tokenizer = tokenizer

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        if pl_module.interrupted:
            return
        for role in pl_module.trained:
            network: Any = pl_module.strategy.network(role)
            export_network(network, self.tokenizer, self.folder / role, gather=pl_module.strategy.gather, is_writer=trainer.is_global_zero)
        pl_module.strategy.barrier()
