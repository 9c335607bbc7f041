"""Stops a run that has gone wrong, and says which number shows it.

Knows ranges of metrics; what a metric means is the module's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.config import UserError
from rlhf.engines.checkpoint import checkpoints
from rlhf.modules.base import RoleModule

MAY_BE_NAN = ("/grad_norm",)
"""Ends of names: the engine does not tell the norm of a step that fp16 skipped."""


class Collapsed(RuntimeError):
    """A metric left its range; the message names it, and the checkpoint before it."""


class Guard(Callback):
    """Looks at the metrics of every iteration before a checkpoint is written, so that the newest checkpoint is a good one."""

    def __init__(self, folder: Path, ranges: Mapping[str, Sequence[float | None]]) -> None:
        """
        Args:
            folder: of the run.
            ranges: smallest and largest value of metrics by name, null for none. A name that a verb does not measure is passed over.

        Raises:
            UserError: a range that is not two numbers in order.
        """
        self.folder = folder
        self.ranges = {}
        for name, bounds in ranges.items():
            given = list(bounds) if isinstance(bounds, Sequence) and not isinstance(bounds, str) else []
            if len(given) != 2 or not all(x is None or isinstance(x, int | float) for x in given):
                raise UserError(f"callbacks.guard.ranges.{name} must be two numbers or null, got {bounds}")
            low, high = (-math.inf if given[0] is None else given[0]), (math.inf if given[1] is None else given[1])
            if low >= high:
                raise UserError(f"callbacks.guard.ranges.{name} must begin below its end, got {given}")
            self.ranges[name] = (low, high)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        wrong = self.out_of_range(pl_module.metrics)
        if wrong:
            raise Collapsed(f"iteration {pl_module.iteration}: {wrong}; {self._way_back()}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gradients that are not finite end a run within its step: says what was seen of it, and where to go on."""
        if isinstance(exception, FloatingPointError) and isinstance(pl_module, RoleModule):
            wrong = self.out_of_range(pl_module.metrics)
            parts = [str(exception), *([wrong] if wrong else []), self._way_back()]
            exception.args = (f"iteration {pl_module.iteration + 1}: {'; '.join(parts)}",)

    def out_of_range(self, metrics: Mapping[str, float]) -> str | None:
        """Names the first metric that is no number or out of its range; None where there is none."""
        for name, value in metrics.items():
            if not math.isfinite(value) and not name.endswith(MAY_BE_NAN):
                return f"{name} is {value}"
        for name, (low, high) in self.ranges.items():
            if name in metrics and not low <= metrics[name] <= high:
                return f"{name} = {metrics[name]:.6g} left its range [{low:g}, {high:g}] (callbacks.guard.ranges)"
        return None

    def _way_back(self) -> str:
        found = checkpoints(self.folder / "checkpoints")
        if not found:
            return "there is no checkpoint to go back to: trainer.checkpoint_every writes some"
        return f"the last good checkpoint is {found[-1]}"
