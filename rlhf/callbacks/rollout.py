"""The moment of a rollout: before each PPO step the actor answers the batch's prompts.

Knows when; which engine answers is `rollout.engine`, and what is learned from it is the module's business.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlhf.config import UserError
from rlhf.engines.generation import HFGenerate, Recorded, RolloutEngine
from rlhf.engines.hybrid import HybridEngine
from rlhf.engines.strategy import RoleStrategy
from rlhf.modules.base import RoleModule
from rlhf.settings import RolloutConfig
from rlhf.types import PromptBatch, Rollout


@runtime_checkable
class Measured(Protocol):
    """An engine that says what its last rollout consisted of."""

    timings: dict[str, float]
    """Seconds by part: gather, swap, prefill, decode, free."""
    facts: dict[str, float]
    """Metrics by name, as they are logged."""


class RolloutCallback(Callback):
    """Fills `batch.rollout` for the training step."""

    def __init__(self, rollout: RolloutConfig, *, samples: int, end_id: int, pad_id: int, tp: int = 1) -> None:
        self.rollout = rollout
        self.tp = tp
        self.samples = samples
        self.end_id = end_id
        self.pad_id = pad_id
        self.engine: RolloutEngine | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, RoleModule)
        strategy: RoleStrategy = trainer.strategy  # type: ignore[assignment]
        if self.rollout.engine == "recorded":
            self.engine = Recorded(strategy, lambda: load_rollout(Path(str(self.rollout.recorded_path)), pl_module.iteration))
        elif self.rollout.engine == "hybrid_engine":
            self.engine = HybridEngine(strategy, self.rollout, end_id=self.end_id, pad_id=self.pad_id, tp=self.tp)
            strategy.closing.append(self.engine.close)
        else:
            self.engine = HFGenerate(strategy, self.rollout, end_id=self.end_id, pad_id=self.pad_id)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int) -> None:
        assert isinstance(pl_module, RoleModule) and self.engine is not None
        with pl_module.clock("generate"):
            batch.rollout = self.engine.generate("actor", batch, samples=self.samples)
        if self.rollout.save_to is not None:
            parts = pl_module.strategy.gather_objects(batch.rollout.to("cpu"))
            if trainer.is_global_zero:
                save_rollout(interleave(parts, self.pad_id), Path(self.rollout.save_to), pl_module.iteration)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Adds what the engine says of its rollout to the step's metrics, which a training step replaces."""
        assert isinstance(pl_module, RoleModule)
        if isinstance(self.engine, Measured):
            pl_module.metrics |= {f"time/rollout_{part}": seconds for part, seconds in self.engine.timings.items()} | self.engine.facts


def interleave(parts: list[Rollout], pad_id: int) -> Rollout:
    """Rollouts of all ranks to one in global order (row g of the whole is row g // ranks of rank g % ranks), padded to one width."""
    prompt = max(part.prompt_length for part in parts)
    answer = max(part.action_mask.shape[1] for part in parts)

    def widen(x: Tensor, part: Rollout, value: Any) -> Tensor:  # (B, P + A) -> (B, prompt + answer)
        pads = (prompt - part.prompt_length, answer - part.action_mask.shape[1])
        return torch.nn.functional.pad(x, pads, value=value)

    logprobs = [part.logprobs for part in parts if part.logprobs is not None]

    def stack(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors, dim=1).flatten(0, 1)

    def last(x: Tensor) -> Tensor:  # (B, A) -> (B, answer)
        return torch.nn.functional.pad(x, (0, answer - x.shape[1]))

    return Rollout(
        ids=stack([widen(p.ids, p, pad_id) for p in parts]),
        mask=stack([widen(p.mask, p, False) for p in parts]),
        action_mask=stack([last(p.action_mask) for p in parts]),
        ended=stack([p.ended for p in parts]),
        logprobs=stack([last(x) for x in logprobs]) if len(logprobs) == len(parts) else None,
    )


def save_rollout(rollout: Rollout, folder: Path, iteration: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{iteration:06d}.part"
    tensors = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, part)
    part.rename(folder / f"{iteration:06d}.pt")


def load_rollout(folder: Path, iteration: int) -> Rollout:
    """What `save_rollout` wrote; without log-probabilities where the engine returned none.

    Raises:
        UserError: the folder holds no rollout for this iteration.
    """
    file = folder / f"{iteration:06d}.pt"
    if not file.is_file():
        raise UserError(f"rollout.recorded_path={folder} holds no {file.name}: record as many iterations as ppo.iterations asks for")
    return Rollout(**torch.load(file, weights_only=True))
