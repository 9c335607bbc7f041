"""Learning rates against transformers' schedules of the same name."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from rlhf.engines.optimizers import learning_rate_factor
from rlhf.settings import SchedulerConfig


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts"])
def test_same_curve_as_transformers(name: str) -> None:
    warmup, total = (0 if name == "constant" else 5), 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    factor = learning_rate_factor(SchedulerConfig(name=name, warmup=warmup, min_lr_ratio=0.0), total)
    for step in range(total):
        assert factor(step) == pytest.approx(reference.get_last_lr()[0], abs=2e-6), step
        optimizer.step()
        reference.step()


def test_warmup_as_a_share_and_a_floor() -> None:
    factor = learning_rate_factor(SchedulerConfig(name="cosine", warmup=0.1, min_lr_ratio=0.2), 100)
    assert [factor(0), factor(5), factor(10)] == pytest.approx([0.0, 0.5, 1.0])
    assert factor(100) == pytest.approx(0.2)
