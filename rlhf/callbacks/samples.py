"""Answers to look at while PPO runs: `samples.jsonl`, and a growing table where a logger shows one.

Knows what a rollout looks like; knows no loss and no logger.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlhf.callbacks.run_log import run_logs
from rlhf.config import UserError
from rlhf.modules.base import RoleModule
from rlhf.types import PromptBatch

Decode = Callable[[Tensor], list[str]]


class Samples(Callback):
    """Writes the first `rows` answers of rank zero every `every` iterations."""

    def __init__(self, folder: Path, decode: Decode, *, every: int, rows: int) -> None:
        self.file = folder / "samples.jsonl"
        self.decode = decode
        if every < 1 or rows < 1:
            raise UserError(f"callbacks.samples.every and .rows must be at least 1, got {every} and {rows}")
        self.every = every
        self.rows = rows

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run repeats iterations: their answers are dropped, and half a line that a killed run left."""
        assert isinstance(pl_module, RoleModule)
        if trainer.is_global_zero and self.file.is_file():
            with self.file.open(encoding="utf-8", newline="\n") as f:
                whole = [line for line in f if line.endswith("\n")]
            part = self.file.with_suffix(".part")
            part.write_text("".join(line for line in whole if json.loads(line)["step"] <= pl_module.iteration), encoding="utf-8")
            part.rename(self.file)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        if (
            not trainer.is_global_zero
            or not isinstance(batch, PromptBatch)
            or batch.rollout is None
            or (pl_module.iteration - 1) % self.every
        ):
            return
        rows = self._table(pl_module, batch)
        with self.file.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for logger in run_logs(trainer.loggers):
            logger.log_rows("samples", rows, pl_module.iteration)

    def _table(self, module: RoleModule, batch: PromptBatch) -> list[dict[str, Any]]:
        assert batch.rollout is not None
        rollout = batch.rollout.rows(slice(0, self.rows))
        columns: dict[str, list[Any]] = {
            "prompt": batch.texts[: self.rows],
            "answer": self.decode(rollout.ids[:, rollout.prompt_length :]),
            "ended": rollout.ended.tolist(),
            "length": rollout.lengths.tolist(),
        }
        if module.scores is not None:
            columns["reward"] = module.scores[: self.rows].tolist()
        return [{"step": module.iteration, **dict(zip(columns, cells, strict=True))} for cells in zip(*columns.values(), strict=False)]
