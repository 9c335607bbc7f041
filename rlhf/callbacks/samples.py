"""Answers to look at while PPO runs: `samples.jsonl`, and a table in W&B.

Knows what a rollout looks like; knows no loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from rlhf.modules.base import RoleModule
from rlhf.types import PromptBatch

Decode = Callable[[Tensor], list[str]]


class Samples(Callback):
    """Writes the first `rows` answers of rank zero every `every` iterations."""

    def __init__(self, folder: Path, decode: Decode, *, every: int, rows: int) -> None:
        self.file = folder / "samples.jsonl"
        self.decode = decode
        self.every = every
        self.rows = rows

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule)
        if (
            not trainer.is_global_zero
            or not isinstance(batch, PromptBatch)
            or batch.rollout is None
            or (pl_module.iteration - 1) % self.every
        ):
            return
        rollout = batch.rollout.rows(slice(0, self.rows))
        answers = self.decode(rollout.ids[:, rollout.prompt_length :])
        table = [
            {"step": pl_module.iteration, "prompt": prompt, "answer": answer, "ended": ended, "length": length}
            for prompt, answer, ended, length in zip(
                batch.texts[: self.rows], answers, rollout.ended.tolist(), rollout.lengths.tolist(), strict=False
            )
        ]
        with self.file.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("samples", columns=list(table[0]), data=[list(row.values()) for row in table], step=pl_module.iteration)
