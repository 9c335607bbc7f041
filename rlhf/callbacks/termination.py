"""SIGTERM, by which `timeout` and clusters end a job, counts as Ctrl-C. Lightning would note it and go on, or wait for other ranks in its handler.

Knows signals; what a run does about one is `checkpoint`'s.
"""

from __future__ import annotations

import signal
import threading

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.engines.launcher import end_at_once

ENDING = (signal.SIGINT, signal.SIGTERM)


class Termination(Callback):
    """Takes SIGTERM back from Lightning as soon as it has set its own handler, which it takes down again at the end. Comes first: a run that saves
    checkpoints has a better answer."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back()

    def _take_back(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, end_at_once)
