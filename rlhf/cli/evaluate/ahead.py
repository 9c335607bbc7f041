"""What of a pipeline's evaluation can be refused before its first step: hours of training come before the evaluation itself could say it.

Knows files and tokenizers; builds no network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.cli.evaluate.prompts import pair_rows, prompt_rows, read_prompts
from rlhf.cli.evaluate.rules import require_no_contradiction
from rlhf.cli.pipeline_ahead import made_here
from rlhf.config import build
from rlhf.data.encode import Limits
from rlhf.data.phases import sft_corpus
from rlhf.data.tokenizer import PreTrainedTokenizerBase, load_tokenizer
from rlhf.models.source import find_export
from rlhf.modules.scorers import require_scorer


def require_possible(whole: Any, step: Mapping[str, Any]) -> None:
    """
    Args:
        whole: settings of the pipeline.
        step: the config of its last step, in which earlier steps' exports are named that are not there yet.

    Raises:
        UserError: roles, scorer, weights or fixed prompts are not what the evaluation needs.
    """
    cfg = build(step)
    evaluation = cfg.evaluation
    require_no_contradiction(cfg)
    named = {
        "reward.init": (cfg.reward.init, ("reward", "actor")), "ref.init": (cfg.ref.init, ("actor", "ref")),
        "evaluation.base": (evaluation.base, ("actor", "ref")),
    }  # fmt: skip
    root = Path(whole.run_dir).absolute()
    for key, (path, exports) in named.items():
        if path is not None and not made_here(path, root):
            find_export(path, *exports, key=key)
    if evaluation.gold is not None:
        there = not any(made_here(value, root) for value in evaluation.gold_kwargs.values())
        require_scorer("evaluation.gold", evaluation.gold, evaluation.gold_kwargs, files=there)
    if evaluation.fixed_prompts is not None:
        _require_short(whole, rewarded=cfg.reward.init is not None)


def _require_short(whole: Any, *, rewarded: bool) -> None:
    """
    Raises:
        UserError: a prompt cannot be read, or it or an answer has more tokens than the data's limits.
    """
    prompts, data = read_prompts(whole.evaluation.fixed_prompts), whole.data
    tokenizer = _first_tokenizer(whole)
    limits = Limits(prompt=data.max_prompt_tokens, answer=data.max_answer_tokens, overlong="drop")
    prompt_rows(prompts, tokenizer, data.chat, limits)
    if rewarded:
        pair_rows(prompts, tokenizer, data.chat, limits)


def _first_tokenizer(whole: Any) -> PreTrainedTokenizerBase:
    """The actor's, which every step hands on to the next; one that is trained comes out the same each time."""
    model, init = whole.actor.model, whole.actor.init
    if init is not None:
        model = dataclasses.replace(model, tokenizer=str(find_export(init, "actor", key="actor.init")))
    trains = model.tokenizer is not None and model.tokenizer.startswith("train:")
    return load_tokenizer(model, whole.data.chat, sft_corpus(whole.data) if trains else None)
