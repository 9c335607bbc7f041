"""The moment before the first step: every rank gets its own random stream, and a resumed run its state.

Knows when; what a checkpoint holds is the engines' and the module's business.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.callbacks.csv_log import MetricsFile
from rlhf.engines.checkpoint import Checkpointer
from rlhf.modules.base import RoleModule

RANK_STRIDE = 100_003
"""Between the seeds of two ranks: a prime far above any range of seeds in a sweep, so that no two streams of a sweep coincide."""


def seed_rank(seed: int, rank: int) -> None:
    """Ranks that shared a stream would sample the same answers."""
    value = (seed + rank * RANK_STRIDE) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class Start(Callback):
    def __init__(self, seed: int, *, resume_from: Path | None) -> None:
        self.seed = seed
        self.resume_from = resume_from

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        seed_rank(self.seed, trainer.global_rank)
        kept = -1  # a run that ended before its first checkpoint begins anew, from the evaluation before step 1 on
        if self.resume_from is not None:
            checkpointer = Checkpointer(self.resume_from.parent, pl_module.strategy, keep=1)
            pl_module.load_state(checkpointer.restore(self.resume_from))
            kept = pl_module.iteration
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.drop_after(kept)
