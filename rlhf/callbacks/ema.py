"""The moments of a moving average: after every iteration it moves, at the end it is exported.

Knows when; where weights lie is the engines' business.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.config import UserError, nearest
from rlhf.engines.ema import AveragedWeights
from rlhf.logging import log
from rlhf.models.export import export_network
from rlhf.modules.base import RoleModule

LEARNERS = ("actor", "critic", "reward")
"""Roles that some step trains; a pipeline's other steps have nothing to average."""


class MovingAverage(Callback):
    """Averages a role's weights over iterations and writes `export/<role>_ema` beside `export/<role>`."""

    measures = True
    """Before a checkpoint is written, which holds the average."""

    def __init__(self, *, role: str, decay: float, folder: Path, tokenizer: Any) -> None:
        """
        Args:
            decay: how much of the average stays at each iteration.

        Raises:
            UserError: a decay outside [0, 1), or no such role.
        """
        if role not in LEARNERS:
            raise UserError(f"callbacks.ema.role: {role} never learns{nearest(role, LEARNERS)}; there are {', '.join(LEARNERS)}")
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay must lie in [0, 1), got {decay}")
        self.role, self.decay = role, decay
        self.folder, self.tokenizer = Path(folder), tokenizer
        self.average: AveragedWeights | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        if self.role not in pl_module.trained:
            log.info("callbacks.ema: this step does not train %s, so there is nothing to average", self.role)
            return
        self.average = AveragedWeights(pl_module.strategy, self.role, self.decay)
        pl_module.strategy.kept[f"ema/{self.role}"] = self.average

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.average is not None:
            self.average.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        if self.average is None or pl_module.interrupted:
            return
        strategy = pl_module.strategy
        with self.average.in_place() as network:
            folder = self.folder / "export" / f"{self.role}_ema"
            export_network(network, self.tokenizer, folder, gather=strategy.gather, is_writer=trainer.is_global_zero)  # type: ignore[arg-type]
        strategy.barrier()
