"""What a pipeline's later steps will need, looked at before the first one starts: hours of training come before a step itself could say it.

Knows configs, files and rows of text; builds no tokenizer and no network.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.cli.folders import require_folders
from rlhf.data.phases import require_rows, require_text
from rlhf.models.source import EXPORTS, find_export
from rlhf.modules.scorers import require_scorer


def require_later_steps(steps: Iterable[Any], root: Path) -> None:
    """
    Args:
        steps: settings of each step that trains, in which earlier steps' exports are named that are not there yet.
        root: the pipeline's directory, where those will be.

    Raises:
        UserError: weights, a reward function, recorded answers or rows of a step are not there, or too few.
    """
    for cfg in steps:
        _require_weights(cfg, root)
        if cfg.verb == "ppo":
            _require_rewards_and_answers(cfg, root)
        phase = cfg.verb
        section = {"sft": "sft", "reward": "rm", "ppo": "ppo"}[phase]
        require_rows(cfg.data, phase, at_least=getattr(cfg, section).batch_size, key=f"{section}.batch_size")


def made_here(path: object, root: Path) -> bool:
    """Whether an earlier step is to write it."""
    return isinstance(path, str) and Path(path).absolute().is_relative_to(root)


def _require_weights(cfg: Any, root: Path) -> None:
    for role, exports in EXPORTS.items():
        init = getattr(getattr(cfg, role, None), "init", None)
        if init is not None and not made_here(init, root):
            find_export(init, *exports, key=f"{role}.init")


def _require_rewards_and_answers(cfg: Any, root: Path) -> None:
    if cfg.ppo.reward_source != "model":
        kwargs = cfg.ppo.reward_function_kwargs
        there = not any(made_here(value, root) for value in kwargs.values())
        require_scorer("ppo.reward_function", cfg.ppo.reward_function, kwargs, files=there)
    require_folders(cfg.rollout, make=False)
    if cfg.ppo.ptx_coef > 0:
        require_text(cfg.data)
