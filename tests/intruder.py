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
    """Memory behind the tensors made since `gc.freeze`, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and not thing.is_sparse:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Intruder(Callback):
    """Writes `memory-RANK.json`: bytes held before and after each of its rollouts."""

    def __init__(self, folder: Path, times: int, tp: int = 1) -> None:
        self.folder, self.times, self.tp = Path(folder), times, tp
        self.engine: HybridEngine | None = None
        self.memory: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: PromptBatch, batch_idx: int) -> None:
        if self.engine is None:
            known = next(callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback))
            rollout = dataclasses.replace(known.rollout, engine="hybrid_engine", recorded_path=None, strict=True)
            gc.freeze()  # looking through all that the libraries have loaded would take a second each time
            self.engine = HybridEngine(trainer.strategy, rollout, end_id=known.end_id, pad_id=known.pad_id, tp=self.tp)
        for _ in range(self.times):
            self._answer(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        for _ in range(self.times):
            self._answer(batch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (self.folder / f"memory-{trainer.global_rank}.json").write_text(json.dumps(self.memory))

    def _answer(self, batch: PromptBatch) -> None:
        """One number comes from torch's random state, the seed of the rollout; it is put back, and nothing else may have been drawn."""
        assert self.engine is not None
        state = torch.get_rng_state()
        before = held_bytes()
        rollout = self.engine.generate("actor", batch, samples=2)
        assert rollout.logprobs is not None and rollout.lengths.min() >= 1
        del rollout
        self.memory.append((before, held_bytes()))
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        torch.randint(2**31, ())
        assert torch.equal(torch.get_rng_state(), after), "more than the seed was drawn"
        torch.set_rng_state(state)
