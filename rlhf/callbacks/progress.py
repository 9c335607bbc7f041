"""A line on the terminal that says which phase a run is in and how it goes.

Knows how to draw; the module's clock says the phase, its metrics say the rest. Without a terminal it prints a plain line now and then.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf.logging import log
from rlhf.modules.base import RoleModule

SHOWN = {
    "sft/loss": "loss",
    "reward/loss": "loss",
    "reward/train_accuracy": "accuracy",
    "rollout/reward": "reward",
    "rollout/kl": "KL",
    "rollout/length": "length",
    "rollout/tokens_per_s": "tok/s",
    "train/tokens_per_s": "tok/s",
}
"""Metrics on the bar, in this order; the first of two with one label wins."""


class ProgressBar(Callback):
    def __init__(self, title: str, total: int, *, plain_every_seconds: float = 20.0) -> None:
        self.title = title
        self.total = total
        self.plain_every_seconds = plain_every_seconds
        self._bar: Progress | None = None
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        if not trainer.is_global_zero:
            return
        self._last = time.monotonic()
        if not sys.stderr.isatty():
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[phase]:>10}"),
            TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task(self.title, total=self.total, completed=pl_module.iteration, phase="", numbers="")
        self._bar.start()
        pl_module.clock.listener = self._show_phase

    def _show_phase(self, phase: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, phase=phase)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        if not trainer.is_global_zero:
            return
        numbers = _numbers(pl_module.metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=pl_module.iteration, numbers=numbers)
        elif time.monotonic() - self._last > self.plain_every_seconds:
            self._last = time.monotonic()
            log.info("%s %d/%d %s", self.title, pl_module.iteration, self.total, numbers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif trainer.is_global_zero and isinstance(pl_module, RoleModule):
            log.info("%s %d/%d %s", self.title, pl_module.iteration, self.total, _numbers(pl_module.metrics))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.stop()


def _numbers(metrics: dict[str, float]) -> str:
    shown: dict[str, str] = {}
    for name, label in SHOWN.items():
        if name in metrics and label not in shown:
            shown[label] = f"{label} {metrics[name]:.4g}"
    return "  ".join(shown.values())
