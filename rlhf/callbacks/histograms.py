"""How rewards and lengths of the answers are distributed, with every row of metrics.

Knows a rollout and the module's scores; what draws them is the loggers' business. metrics.csv has the means.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.callbacks.run_log import run_logs
from rlhf.modules.base import RoleModule
from rlhf.types import PromptBatch


class Histograms(Callback):
    """`histogram/reward` and `histogram/length` of an iteration's answers over all ranks. Collective."""

    def __init__(self, *, log_every: int) -> None:
        """
        Args:
            log_every: iterations, as of the metrics: `trainer.log_every`.
        """
        self.log_every = log_every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        logs = run_logs(trainer.loggers)
        if not logs or not isinstance(batch, PromptBatch) or batch.rollout is None or pl_module.iteration % self.log_every:
            return
        scores = [] if pl_module.scores is None else pl_module.scores.tolist()
        parts = pl_module.strategy.gather_objects((scores, batch.rollout.lengths.tolist()))
        values = {"histogram/reward": [x for part, _ in parts for x in part], "histogram/length": [x for _, part in parts for x in part]}
        for logger in logs:
            logger.log_histograms({name: numbers for name, numbers in values.items() if numbers}, pl_module.iteration)
