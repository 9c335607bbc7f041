"""Small settings and tokenizers for the data room's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf.data.tokenizer import load_tokenizer
from rlhf.settings import ChatFormat, DataConfig, ModelConfig

CHAT = ChatFormat(human=" Human: {text}", assistant=" Assistant:", end_of_turn=None)
WORDS = [f" Human: question{i} Assistant: good{i} bad{i} answer" for i in range(60)]


def model_config(tokenizer: str | None) -> ModelConfig:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 64}
    return ModelConfig(name="tiny", path=None, pretrained=False, family="opt", shape=shape, parameters=1, tokenizer=tokenizer)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(model_config("train:word:512"), CHAT, WORDS)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., DataConfig]:
    def make(**changes: Any) -> DataConfig:
        values: dict[str, Any] = {
            "sources": ["pairs"], "path": str(tmp_path / "pairs.jsonl"), "sft_only": [], "ptx": [], "split": [2, 4, 4], "split_seed": 1234,
            "eval_fraction": 0.2, "max_rows": None, "shuffle_preferences": False, "chat": CHAT, "gold": None, "max_prompt_tokens": 16,
            "max_answer_tokens": 8, "overlong": "drop", "length_bucket": 4, "cache_dir": str(tmp_path / "cache"), "workers": 0,
        }  # fmt: skip
        return DataConfig(**(values | changes))

    return make


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question{i}", "chosen": f"good{i} answer", "rejected": f"bad{i}"} for i in range(count)]
