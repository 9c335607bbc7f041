"""What an evaluation cannot be asked for, said before anything is loaded. Knows settings; knows no file and no model."""

from __future__ import annotations

from typing import Any

from rlhf.config import UserError


def require_no_contradiction(cfg: Any) -> None:
    """
    Raises:
        UserError: something is asked for that the roles and sizes of this evaluation cannot give.
    """
    evaluation = cfg.evaluation
    answers = evaluation.prompts > 0
    if cfg.actor.init is None and not cfg.actor.model.pretrained:
        raise UserError("actor.init is not set: name the run directory or export to evaluate")
    if cfg.ref.shared:
        raise UserError("ref.shared=true is for training: an evaluation compares exports, and the one before is ref.init")
    if cfg.ref.init is not None and cfg.ref.init == cfg.actor.init:
        raise UserError("ref.init and actor.init are the same: there is nothing to compare")
    if not (answers or evaluation.texts or evaluation.fixed_prompts or (evaluation.pairs and cfg.reward.init is not None)):
        raise UserError(
            "nothing is asked for: set evaluation.prompts, evaluation.texts or evaluation.fixed_prompts, or evaluation.pairs with a reward.init"
        )
    if evaluation.base is not None and not answers:
        raise UserError(
            f"evaluation.base={evaluation.base} needs answers to measure the KL of, but evaluation.prompts=0: set it, or set evaluation.base=null"
        )
    for judge in evaluation.win_rate or []:
        scorer, there = ("reward.init", cfg.reward.init) if judge == "reward" else ("evaluation.gold", evaluation.gold)
        missing = "ref.init" if cfg.ref.init is None else scorer if there is None else None if answers else "evaluation.prompts"
        if missing:
            raise UserError(
                f"evaluation.win_rate asks for a win rate by {judge}, which needs {missing}: set it, or set evaluation.win_rate=null"
            )
