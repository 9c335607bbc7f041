"""A callback that kills its own process, as a lost machine would."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import Callback


class KillRank(Callback):
    """SIGKILL in the middle of an iteration (after its rollout) on the last rank, if the environment says which: KILL_AT=5."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if os.environ.get("KILL_AT") == str(pl_module.iteration) and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
