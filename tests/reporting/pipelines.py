"""Pipelines as `rlhf pipeline` leaves them, in small, for tests of the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiment_folder import config, run

SFT = {"sft/perplexity_before": 135.2, "sft/perplexity": 12.876}
REWARD = {"reward/accuracy_before": 0.48, "reward/accuracy": 0.81}
EVALUATE = {
    "gold/base": 0.49, "gold/ppo": 0.76, "difference/gold": 0.27, "difference/gold_low": 0.2, "difference/gold_high": 0.34,
    "reward/base": 0.1, "reward/ppo": 1.4, "length/base": 20.0, "length/ppo": 24.0, "kl": 5.2, "win_rate/gold": 0.7, "win_rate/gold_low": 0.6,
    "win_rate/gold_high": 0.8, "reward/accuracy": 0.75, "reward/accuracy/web": 0.9, "reward/accuracy/books": 0.6, "reward/calibration_error": 0.031,
    "calibration/50-55/count": 8.0, "calibration/50-55/predicted": 0.52, "calibration/50-55/right": 0.5, "calibration/90-95/count": 1200.0,
    "calibration/90-95/predicted": 0.93, "calibration/90-95/right": 0.9, "evaluated/pairs": 1208.0,
}  # fmt: skip
ANSWERS = (
    {"prompt": "Say <b>hi</b>.", "base": "no", "ppo": "hi\n  there", "gold/base": 0.0, "gold/ppo": 1.0, "length/ppo": 3.0, "ended/ppo": True},
    {"prompt": "What is red?", "base": "a <i>plum</i>", "ppo": "", "reward/ppo": -0.5, "length/ppo": 8.0, "ended/ppo": False, "fixed": True},
)  # fmt: skip


def pipeline(folder: Path, *, seed: int = 0, steps: dict[str, dict[str, float]] | None = None, kl_coef: float = 0.1, **fields: Any) -> Path:
    """A pipeline whose `steps` are done, each with its metrics; the whole has them all, later ones in the place of earlier ones."""
    steps = {"sft": SFT, "reward": REWARD, "ppo": {"rollout/kl": 5.0}, "evaluate": EVALUATE} if steps is None else steps
    own = config(seed, kl_coef=kl_coef) | {"evaluation": {"names": ["base", "ppo"]}, "ref": {"init": "sft"}, "steps": list(steps)}
    whole: dict[str, float] = {}
    for step, metrics in steps.items():
        whole |= metrics
        run(folder / step, None, seed=seed, verb=step, status="done", error=None, metrics=metrics, config=own | {"verb": step})
    if "evaluate" in steps:
        (folder / "evaluate" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    ended = {"status": "done", "error": None} | fields
    return run(folder, None, seed=seed, verb="pipeline", metrics=whole, config=own | {"verb": "pipeline"}, **ended)
