"""Loads a checkpoint to answer or to judge with: a model and its tokenizer from a folder in HF layout, with no engine around them.

Knows transformers; knows no conversation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from rlhf.config import UserError


def load_policy(folder: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model, frozen, and tokenizer.

    Raises:
        UserError: the folder holds no causal language model, its weights cannot be read, or it has no tokenizer.
    """
    config = _config(folder)
    names = config.architectures or []
    if any("SequenceClassification" in name for name in names):
        raise UserError(f"{folder} holds a reward model ({names[0]}), which scores and does not answer: give an actor's export")
    return _load(AutoModelForCausalLM, folder, device=device, dtype=dtype)


def load_judge(folder: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A reward model, frozen, and its tokenizer.

    Raises:
        UserError: the folder holds no model with one score, its weights cannot be read, or it has no tokenizer.
    """
    config = _config(folder)
    names = config.architectures or []
    if config.num_labels != 1 or not any("SequenceClassification" in name for name in names):
        raise UserError(f"{folder} holds no reward model ({', '.join(names) or 'no architecture named'}): give an export of rlhf reward")
    return _load(AutoModelForSequenceClassification, folder, device=device, dtype=dtype)


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder}/config.json says nothing that can be loaded: {_first_line(error)}") from error


def _load(kind: Any, folder: Path, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    disable_progress_bar()  # a chat is no place for it
    try:
        model = kind.from_pretrained(folder, dtype=dtype)
    except Exception as error:
        raise UserError(f"the weights in {folder} cannot be loaded: {_first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder} holds no tokenizer that can be loaded: {_first_line(error)}") from error
    return model.to(device).eval().requires_grad_(False), tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
