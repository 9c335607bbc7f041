"""An evaluation takes no more memory than a step of training: as many rows a pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf.callbacks.evaluation import Evaluate
from rlhf.modules.base import RoleModule
from rlhf.types import TextBatch


class Counted(RoleModule):
    """Keeps how many rows came at once."""

    def __init__(self, micro: int | None) -> None:
        super().__init__({})
        self.micro_batch_size, self.seen = micro, list[int]()

    @property
    def strategy(self) -> Any:
        return SimpleNamespace(sum_over_ranks=lambda value: value)

    def evaluate_batch(self, batch: TextBatch) -> dict[str, Tensor]:
        self.seen.append(len(batch))
        return {"rows": torch.tensor(float(len(batch)))}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        return sums


def batch(rows: int) -> TextBatch:
    mask = torch.ones(rows, 3, dtype=torch.bool)
    return TextBatch(ids=torch.zeros(rows, 3, dtype=torch.int64), mask=mask, loss_mask=mask)


def test_rows_come_as_they_do_in_training() -> None:
    for micro, expected in ((2, [2, 2, 1, 2, 1]), (None, [5, 3])):
        module, trainer = Counted(micro), SimpleNamespace(loggers=[])
        evaluate = Evaluate([batch(5), batch(3)], every=None)
        evaluate.on_train_start(trainer, module)  # type: ignore[arg-type]
        assert module.seen == expected and evaluate.first == {"rows": 8.0} == module.measured["before"]
        module.iteration, module.interrupted = 2, True
        evaluate.on_train_end(trainer, module)  # type: ignore[arg-type]
        assert module.seen == expected, "Ctrl-C ends a run without another look"
