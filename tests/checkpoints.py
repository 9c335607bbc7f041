"""Tiny checkpoints in HF layout with a tokenizer of their own and DeepSpeed-Chat's chat format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data.tokenizer import load_tokenizer
from rlhf.settings import ChatFormat, ModelConfig

CORPUS = ["name four fruits and three animals, größer, 你好 世界 🙂", " Human: what is red? Assistant: a plum is red."] * 20
CHAT = ChatFormat(human=" Human: {text}", assistant=" Assistant:", end_of_turn=None)


def tokenizer_of_tests(kind: str = "train:bpe:300") -> Any:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 64}
    model = ModelConfig(name="t", family="llama", path=None, pretrained=False, tokenizer=kind, parameters=1, shape=shape)
    return load_tokenizer(model, CHAT, CORPUS)


WORDS = "train:word:64"
"""A tokenizer whose every token is a word, for models that are to say some: torn letters are most of what random bytes give."""


def save_policy(folder: Path, *, seed: int = 0, positions: int = 96, tokenizer: str = "train:bpe:300") -> Any:
    """A random causal model whose greedy answers vary."""
    return _save(AutoModelForCausalLM, folder, seed, tokenizer, max_position_embeddings=positions)


def save_reward(folder: Path, *, seed: int = 1, positions: int = 96, tokenizer: str = "train:bpe:300") -> Any:
    return _save(AutoModelForSequenceClassification, folder, seed, tokenizer, max_position_embeddings=positions, num_labels=1)


def _save(kind: Any, folder: Path, seed: int, name: str, **changes: Any) -> Any:
    tokenizer = tokenizer_of_tests(name)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    model = kind.from_config(config("llama", vocab_size=len(tokenizer), **ids, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
