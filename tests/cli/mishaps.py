"""Callbacks that go wrong on purpose, for commands run by tests."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class FailIn(Callback):
    """Raises in the middle of the run whose directory has this name."""

    def __init__(self, folder: Path, *, name: str) -> None:
        self.fails = folder.name == name

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.fails and pl_module.iteration == 2:
            raise RuntimeError("the disk is on fire")


class Slow(Callback):
    """Gives a test the time to press Ctrl-C."""

    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.seconds)


def shorter_is_better(prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
    return [-float(len(answer)) for answer in answers]


class StopAt(Callback):
    """Ends the training as a user's own callback would: early, and not by mistake."""

    def __init__(self, *, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = pl_module.iteration == self.iteration


class PressTwice(Callback):
    """The second Ctrl-C, in the middle of an iteration."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.iteration == 1:
            raise KeyboardInterrupt


def refuses_elsewhere(prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
    """Answers that only the second rank has are the ones that cannot be scored."""
    if os.environ["RANK"] == "1":
        raise KeyError("no answer like that")
    return [0.0] * len(answers)


calls = 0


def refuses_later(prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
    """Good for one iteration."""
    global calls
    calls += 1
    return [0.0 if calls < 2 else float("nan")] * len(answers)


def refuses(prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
    raise KeyError("no answer like that")


class Poison(Callback):
    """Makes the reward model answer NaN from the second iteration on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.iteration == 1:
            pl_module.strategy.network("reward").model.score.weight.data.fill_(float("nan"))
