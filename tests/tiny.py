"""Small models and data built in the tests: nothing is downloaded. Plain functions, for any test to call."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

VOCAB = 64
COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}

SHAPES: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64,
            "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    "opt-post-ln": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64,
                    "word_embed_proj_dim": 16, "do_layer_norm_before": False, "dropout": 0.0, "attention_dropout": 0.0},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
              "max_position_embeddings": 64, "tie_word_embeddings": True},
    "qwen2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
              "max_position_embeddings": 64},
    "gpt2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                 "max_position_embeddings": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64,
                "attention_types": [[["global", "local"], 1]], "window_size": 8, "resid_dropout": 0.0, "embed_dropout": 0.0,
                "attention_dropout": 0.0},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "tie_word_embeddings": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "rotary_dim": 8, "tie_word_embeddings": False},
}  # fmt: skip
"""Families of transformers, two layers each."""


def config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family.split("-")[0], **{**COMMON, **SHAPES[family], **changes})


def save_causal(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM saved in HF layout; returns it for comparison."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, **changes)).eval()
    model.save_pretrained(folder)
    return model


def save_scalar(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config(family, num_labels=1, **changes)).eval()
    model.save_pretrained(folder)
    return model


def write_pairs(file: Path, rows: int = 64, *, seed: int = 0) -> Path:
    """A jsonl of prompts with a better and a worse answer: the better one is the words of the prompt in order."""
    rng = random.Random(seed)
    words = ["red", "blue", "green", "black", "white", "brown", "pink", "grey"]
    with file.open("w") as f:
        for _ in range(rows):
            some = rng.sample(words, 3)
            f.write(json.dumps({"prompt": " ".join(some), "chosen": " ".join(some), "rejected": " ".join(reversed(some))}) + "\n")
    return file
