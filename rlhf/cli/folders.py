"""Folders that a rollout reads answers from or saves them to, looked at before a network is built. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import UserError
from rlhf.settings import RolloutConfig


def require_folders(rollout: RolloutConfig, *, make: bool) -> None:
    """What a rollout reads is there, and what it saves has a place.

    Args:
        make: makes the folder of `save_to`.

    Raises:
        UserError: `recorded_path` is no folder, or `save_to` cannot be one.
    """
    if rollout.engine == "recorded" and not Path(str(rollout.recorded_path)).is_dir():
        raise UserError(f"rollout.recorded_path={rollout.recorded_path} is no folder: give the one that rollout.save_to of a run named")
    if rollout.save_to is not None and make:
        try:
            Path(rollout.save_to).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"rollout.save_to={rollout.save_to} cannot be made: {error.strerror}: give a folder you may write to"
            ) from error
