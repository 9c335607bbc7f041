"""A PPO run that is killed in the middle of an iteration and resumed gives the numbers and the weights of one that was not."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_pairs

TESTS = Path(__file__).parents[1]
SMALL = (
    "model@actor.model=tiny", "model@critic.model=tiny", "model@reward.model=tiny", "data=pairs", "data.max_prompt_tokens=12",
    "data.max_answer_tokens=8", "data.split=[1,1,2]", "ppo.iterations=6", "ppo.batch_size=8", "ppo.minibatch_size=4", "ppo.micro_batch_size=2",
    "ppo.score_micro_batch_size=4", "ppo.epochs=2", "ppo.actor_optimizer.lr=1e-3", "ppo.critic_optimizer.lr=1e-3", "ppo.kl_target=0.5",
    "ppo.kl_horizon=50", "ppo.reward_scaling=true", "ppo.ptx_coef=0.5", "data.ptx=[pairs]", "actor.dropout=0.1", "trainer.checkpoint_every=2",
    "callbacks=none", "+callbacks.kill._target_=crash.KillRank",
)  # fmt: skip
"""Everything that a checkpoint has to carry is on: adaptive KL, running reward statistics, plain text, dropout, several epochs, schedules."""
DECAY = 0.7
EMA = ("+callbacks.ema._target_=rlhf.callbacks.ema.MovingAverage", "+callbacks.ema.role=actor", f"+callbacks.ema.decay={DECAY}")


def ppo(run_dir: Path, *overrides: str, kill_at: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(TESTS)} | ({} if kill_at is None else {"KILL_AT": str(kill_at)})
    command = [sys.executable, "-m", "rlhf", "ppo", f"run_dir={run_dir}", *overrides]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock measured."""
    with (run_dir / "metrics.csv").open(newline="") as f:
        return [{k: v for k, v in row.items() if not k.startswith("time/") and not k.endswith("per_s")} for row in csv.DictReader(f)]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(1, ()), (2, ("zero@actor.zero=z3", "zero@critic.zero=z2"))],
    ids=["1 rank", "2 ranks, sharded"],
)
def test_killed_and_resumed_equals_uninterrupted(ranks: int, extra: tuple[str, ...], tmp_path: Path) -> None:
    data = (f"data.path={write_pairs(tmp_path / 'pairs.jsonl', 64)}", f"data.cache_dir={tmp_path / 'cache'}", f"trainer.devices={ranks}")
    whole = ppo(tmp_path / "whole", *SMALL, *EMA, *data, *extra)
    assert whole.returncode == 0, whole.stderr
    killed = ppo(tmp_path / "killed", *SMALL, *EMA, *data, *extra, kill_at=5)
    assert killed.returncode != 0
    assert len(rows(tmp_path / "killed")) == 5, killed.stderr
    resumed = ppo(tmp_path / "killed", "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "whole")) == 6
    for network in ("actor", "actor_ema", "critic"):
        first, second = (load_file(tmp_path / run / "export" / network / "model.safetensors") for run in ("whole", "killed"))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first), network
