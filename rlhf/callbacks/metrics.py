"""What a step measured, to every logger; and the time and tokens of its phases.

Knows no formula of the recipe: modules fill `metrics`, callbacks add, this one writes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.modules.base import RoleModule


class Throughput(Callback):
    """Seconds of each phase, tokens per second over all ranks, and peak memory; names `time/*`, `<phase>/tokens_per_s`."""

    measures = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        pl_module.clock.drain()
        if pl_module.device.type == "cuda":
            pl_module.clock.synchronize = torch.cuda.synchronize
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        seconds = pl_module.clock.drain()
        pl_module.metrics |= {f"time/{phase}": value for phase, value in seconds.items()}
        counts = torch.tensor([float(n) for n in pl_module.tokens.values()], dtype=torch.float64, device=pl_module.device)
        for phase, count in zip(pl_module.tokens, pl_module.strategy.sum_over_ranks(counts).tolist(), strict=True):
            if seconds.get(phase, 0) > 0:
                name = "rollout" if phase == "generate" else phase
                pl_module.metrics[f"{name}/tokens_per_s"] = count / seconds[phase]
        if pl_module.device.type == "cuda":
            pl_module.metrics["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9


class WriteMetrics(Callback):
    """Hands the module's metrics to the loggers every `every` iterations and keeps the last ones and the phases' total seconds."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.last: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        self.last = {name: value for name, value in pl_module.metrics.items() if math.isfinite(value)}
        for name, value in pl_module.metrics.items():
            if name.startswith("time/"):
                self.seconds[name[5:]] = self.seconds.get(name[5:], 0.0) + value
        if pl_module.iteration % self.every == 0:
            self.write(trainer, pl_module.metrics, pl_module.iteration)

    @staticmethod
    def write(trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
