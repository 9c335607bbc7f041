"""Commands that would run, for tests to spoil, and what a refusal has to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from jobs import composed

from rlhf.cli.rundir import claim, write_summary

Refused = Callable[..., str]

DATA = ("data=pairs", "data.max_prompt_tokens=12", "data.max_answer_tokens=8", "data.split=[1,1,2]", "callbacks=none")
SFT = ("sft", "model@actor.model=tiny", *DATA, "sft.batch_size=4", "sft.micro_batch_size=4")
REWARD = ("reward", "model@reward.model=tiny", *DATA, "rm.batch_size=4", "rm.micro_batch_size=4")
PPO = (
    "ppo", "model@actor.model=tiny", "model@critic.model=tiny", "model@reward.model=tiny", *DATA, "ppo.batch_size=4", "ppo.minibatch_size=4",
    "ppo.micro_batch_size=4",
)  # fmt: skip
HYBRID = ("rollout=hybrid_engine",)
EVALUATE = ("evaluate", "model@actor.model=tiny", "model@reward.model=tiny", *DATA)


def says(message: str, parts: tuple[str, ...]) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def begun(run_dir: Path, pairs: Path, *, status: str | None, file_size: int = 8, ranks: int = 1) -> Path:
    """The directory of an SFT run as it looks with one checkpoint, which lists a file of eight bytes."""
    config = composed(*SFT, f"run_dir={run_dir}", f"data.path={pairs}")
    claim(run_dir, config)
    if status is not None:
        write_summary(config, status)
    checkpoint = run_dir / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "module.pt").write_bytes(b"\0" * file_size)
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 2, "world_size": ranks, "files": {"module.pt": 8}}))
    return run_dir
