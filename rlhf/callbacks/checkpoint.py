"""The moments of a checkpoint: every so many steps, and when the user presses Ctrl-C or a cluster ends the job (SIGTERM).

Knows when and under which step; what a checkpoint holds is the engines' and the module's business.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.callbacks.termination import ENDING
from rlhf.engines.checkpoint import Checkpointer
from rlhf.logging import log
from rlhf.modules.base import RoleModule


class Checkpoint(Callback):
    """Saves on the way and turns the first Ctrl-C or SIGTERM into a checkpoint and a clean end.

    Attributes:
        saved: the checkpoint written because of it, if there was one.
    """

    def __init__(self, folder: Path, *, every: int | None, keep: int) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep
        self.saved: Path | None = None
        self._asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        self.checkpointer = Checkpointer(self.folder, pl_module.strategy, keep=self.keep)
        self._previous = {number: signal.signal(number, self._ask) for number in ENDING}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        log.warning("%s: finishing this step, then saving; a second one stops at once", "Ctrl-C" if number == signal.SIGINT else "SIGTERM")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        # Ranks hear the signal at different times; they save together or wait for each other forever.
        asked = bool(pl_module.strategy.max_over_ranks(torch.tensor(float(self._asked), device=pl_module.device)))
        if asked or (self.every is not None and pl_module.iteration % self.every == 0):
            with pl_module.clock("checkpoint"):
                path = self.checkpointer.save(pl_module.iteration, pl_module.state())
            if asked:
                self.saved = path
                pl_module.interrupted = trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handler()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handler()

    def _restore_handler(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
