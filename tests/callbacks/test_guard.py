"""Which metrics end a run, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.callbacks.guard import Collapsed, Guard
from rlhf.config import UserError
from rlhf.modules.base import RoleModule

RANGES = {"rollout/kl": [-10, 100], "actor/entropy": [0.1, None]}


def module(**metrics: float) -> RoleModule:
    made = RoleModule({})
    made.iteration = 7
    made.metrics = {name.replace("__", "/"): value for name, value in metrics.items()}
    return made


def judged(folder: Path, **metrics: float) -> str | None:
    try:
        Guard(folder, RANGES).on_train_batch_end(None, module(**metrics), None, None, 0)  # type: ignore[arg-type]
    except Collapsed as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"rollout__kl": 100.0, "actor__entropy": 0.1}, None),
        ({"sft__loss": 1e9}, None),
        ({"actor__grad_norm": math.nan}, None),
        ({"rollout__kl": 100.5}, "iteration 7: rollout/kl = 100.5 left its range [-10, 100] (callbacks.guard.ranges)"),
        ({"rollout__kl": -11.0}, "rollout/kl = -11 left its range"),
        ({"actor__entropy": 0.0}, "actor/entropy = 0 left its range [0.1, inf]"),
        ({"critic__loss": math.nan}, "iteration 7: critic/loss is nan"),
        ({"actor__ratio_max": math.inf, "rollout__kl": 1e4}, "actor/ratio_max is inf"),
    ],
)
def test_what_ends_a_run(metrics: dict[str, float], says: str | None, tmp_path: Path) -> None:
    message = judged(tmp_path, **metrics)
    assert (message is None) if says is None else (message is not None and says in message)


def test_the_newest_whole_checkpoint_is_named(tmp_path: Path) -> None:
    assert "there is no checkpoint to go back to: trainer.checkpoint_every writes some" in str(judged(tmp_path, critic__loss=math.nan))
    for step in (2, 10, 12):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        if step != 12:  # the last one was being written
            (tmp_path / "checkpoints" / f"step-{step:06d}" / "manifest.json").touch()
    assert str(judged(tmp_path, critic__loss=math.nan)).endswith("step-000010")


def test_gradients_that_are_not_finite_are_traced_to_a_metric(tmp_path: Path) -> None:
    error: Any = FloatingPointError("critic: the gradients are not finite")
    Guard(tmp_path, RANGES).on_exception(None, module(rollout__reward=math.nan), error)  # type: ignore[arg-type]
    assert str(error).startswith("iteration 8: critic: the gradients are not finite; rollout/reward is nan; there is no checkpoint")
    other = KeyError("x")
    Guard(tmp_path, RANGES).on_exception(None, module(rollout__reward=math.nan), other)  # type: ignore[arg-type]
    assert other.args == ("x",)


@pytest.mark.parametrize("bounds", [[1], [1, 2, 3], ["a", 2], 5, "ab", [2, 1], [1, 1]])
def test_a_range_that_is_none(bounds: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks\.guard\.ranges\.rollout/kl must"):
        Guard(tmp_path, {"rollout/kl": bounds})
