"""What a step measured, to every logger; and the time and tokens of its phases.

Knows no formula of the recipe: modules fill `metrics`, callbacks add, this one writes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.inference.arena import mapped_memory
from rlhf.modules.base import RoleModule


class GpuMeter:
    """Memory of the current GPU: what PyTorch has allocated, and what the hybrid engine maps beside it. Not counted are the CUDA context
    and memory that PyTorch holds without using it."""

    def __init__(self) -> None:
        self.most = 0
        """Bytes; the peak since the meter was made."""
        torch.cuda.reset_peak_memory_stats()
        mapped_memory.restart()

    def begin(self) -> None:
        torch.cuda.synchronize()
        self._look()
        torch.cuda.reset_peak_memory_stats()
        mapped_memory.restart()

    def end(self) -> int:
        torch.cuda.synchronize()
        return self._look()

    def _look(self) -> int:
        peak = torch.cuda.max_memory_allocated() + mapped_memory.most
        self.most = max(self.most, peak)
        return peak


class Throughput(Callback):
    """Seconds and peak memory of each phase, tokens per second over all ranks; names `time/*`, `memory/*`, `<phase>/tokens_per_s`."""

    measures = True

    def __init__(self) -> None:
        self.meter: GpuMeter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        pl_module.clock.drain()
        if pl_module.device.type == "cuda":
            self.meter = pl_module.clock.meter = GpuMeter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        seconds, peaks = pl_module.clock.drain()
        pl_module.metrics |= {f"time/{phase}": value for phase, value in seconds.items()}
        pl_module.metrics |= {f"memory/{phase}_gb": value / 1e9 for phase, value in peaks.items()}
        counts = torch.tensor([float(n) for n in pl_module.tokens.values()], dtype=torch.float64, device=pl_module.device)
        for phase, count in zip(pl_module.tokens, pl_module.strategy.sum_over_ranks(counts).tolist(), strict=True):
            if seconds.get(phase, 0) > 0:
                name = "rollout" if phase == "generate" else phase
                pl_module.metrics[f"{name}/tokens_per_s"] = count / seconds[phase]
        if self.meter is not None:
            pl_module.metrics["memory/peak_gb"] = self.meter.most / 1e9


class WriteMetrics(Callback):
    """Hands the module's metrics to the loggers every `every` iterations and keeps the last ones and the phases' total seconds."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.last: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        self.last = dict(pl_module.measured.get("last", {}))  # a run resumed at its end has no iteration left to measure

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        self.last = {name: value for name, value in pl_module.metrics.items() if math.isfinite(value)}
        pl_module.measured["last"] = self.last
        for name, value in pl_module.metrics.items():
            if name.startswith("time/"):
                self.seconds[name[5:]] = self.seconds.get(name[5:], 0.0) + value
        if pl_module.iteration % self.every == 0:
            self.write(trainer, pl_module.metrics, pl_module.iteration)

    @staticmethod
    def write(trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
