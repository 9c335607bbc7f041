"""The moments of an evaluation on held-out rows: before the first step, every so many, and after the last.

Knows when; what is measured is the module's `evaluate_batch`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.callbacks.metrics import WriteMetrics
from rlhf.modules.base import RoleModule, as_scalars


class Evaluate(Callback):
    """Keeps the newest held-out metrics in `last`."""

    def __init__(self, loader: Iterable[Any], *, every: int | None) -> None:
        self.loader = loader
        self.every = every
        self.last: dict[str, float] = {}
        self.first: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        if pl_module.iteration == 0:  # a resumed run was measured when it began
            pl_module.measured["before"] = self._evaluate(trainer, pl_module)
        self.first = pl_module.measured.get("before", {})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        if self.every is not None and pl_module.iteration % self.every == 0:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        if not pl_module.interrupted:
            self._evaluate(trainer, pl_module)

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, module: RoleModule) -> dict[str, float]:
        module.eval()
        totals: dict[str, torch.Tensor] = {}
        with module.clock("evaluate"):
            for batch in self.loader:
                for part in module.passes(batch.to(module.device)):
                    for name, value in module.evaluate_batch(part).items():
                        totals[name] = totals.get(name, 0) + value.double()
            if totals:
                flat = module.strategy.sum_over_ranks(torch.stack(list(totals.values())))
                self.last = module.summarize(as_scalars(dict(zip(totals, flat, strict=True))))
                WriteMetrics.write(trainer, self.last, module.iteration)
        module.train()
        return dict(self.last)
