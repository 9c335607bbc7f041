"""A callback that lets the hybrid engine answer around every training step and throws the answers away."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from rlhf.callbacks.rollout import RolloutCallback
from rlhf.engines.hybrid import HybridEngine
from rlhf.types import PromptBatch


def held_bytes() -> int:
    """Memory behind all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and not thing.is_sparse:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Intruder(Callback):
    """Answers `times` times before each training step and once after it; `memory-RANK.json` has what was held around the former."""

    def __init__(self, folder: Path, times: int, tp: int = 1) -> None:
        self.folder, self.times, self.tp = Path(folder), times, tp
        self.engine: HybridEngine | None = None
        self.memory: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: PromptBatch, batch_idx: int) -> None:
        if self.engine is None:
            known = next(callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback))
            rollout = dataclasses.replace(known.rollout, engine="hybrid_engine", recorded_path=None, strict=True)
            self.engine = HybridEngine(trainer.strategy, rollout, end_id=known.end_id, pad_id=known.pad_id, tp=self.tp)
        before = held_bytes()
        self._answer(batch, self.times)
        self.memory.append((before, held_bytes()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        self._answer(batch, 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (self.folder / f"memory-{trainer.global_rank}.json").write_text(json.dumps(self.memory))

    def _answer(self, batch: PromptBatch, times: int) -> None:
        """One number a rollout comes from torch's random state; it is put back, and nothing else may have been drawn."""
        assert self.engine is not None
        state = torch.get_rng_state()
        for _ in range(times):
            rollout = self.engine.generate("actor", batch, samples=2)
            assert rollout.logprobs is not None and rollout.lengths.min() >= 1
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        for _ in range(times):
            torch.randint(2**31, ())
        assert torch.equal(torch.get_rng_state(), after), "more than the seeds was drawn"
        torch.set_rng_state(state)
