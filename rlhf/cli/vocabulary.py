"""The roles of one PPO read the same tokens: what the model groups say of that, before anything is trained or loaded.

Knows settings; knows no tokenizer. Weights that `init` names are compared by their tokenizers themselves, once they are there.
"""

from __future__ import annotations

from typing import Any

from rlhf.config import UserError
from rlhf.rules import critic_start, roles
from rlhf.settings import ModelConfig

PADDING = 512
"""Models of one family pad one vocabulary to different sizes: Pythia to 50304, 50432 and 50688, Qwen2.5 to 151936 and 152064."""


def require_one_vocabulary(cfg: Any) -> None:
    """
    Raises:
        UserError: a role of PPO would start from weights that know other tokens than the actor's.
    """
    if cfg.verb not in ("ppo", "pipeline") or cfg.actor.init is not None:
        return
    actor = cfg.actor.model
    for name in ("reward", "critic"):
        if _reads_own_tokens(cfg, name) and _differ(actor, (model := getattr(cfg, name).model)):
            raise UserError(
                f"{name}.model={model.name} and actor.model={actor.name} have different tokenizers ({_said(model)}, {_said(actor)}), but the "
                f"roles of PPO read the same tokens: choose a model@{name}.model with the actor's vocabulary"
            )


def _reads_own_tokens(cfg: Any, role: str) -> bool:
    """Whether a role's weights know the tokens of its model group: random weights learn whatever they are given."""
    settings = getattr(cfg, role)
    if cfg.verb == "pipeline":
        reads = "evaluate" in cfg.steps or ("ppo" in cfg.steps and cfg.ppo.reward_source != "function")
        return role == "reward" and "reward" in cfg.steps and settings.init is None and reads
    if role not in roles(cfg):
        return False
    first = critic_start(cfg) if role == "critic" else role
    return settings.init is None and getattr(cfg, str(first)).init is None and settings.model.pretrained


def _differ(one: ModelConfig, other: ModelConfig) -> bool:
    """Only where it is sure: models with one tokenizer often name it by their own paths."""
    names = [model.tokenizer or model.path or "" for model in (one, other)]
    if names[0] == names[1]:
        return False
    if any(name.startswith("train:") for name in names):
        return True
    apart = abs(one.shape["vocab_size"] - other.shape["vocab_size"])
    return apart > (PADDING if one.family == other.family else 0)


def _said(model: ModelConfig) -> str:
    name = model.tokenizer or model.path
    return str(name) if str(name).startswith("train:") else f"{name}: {model.shape['vocab_size']} tokens"
