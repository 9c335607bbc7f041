"""Which rows are trained on and how a conversation is written.

Types and ranges only: the values live in conf/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.settings.ranges import require, require_at_least_one, require_in


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a conversation is written as text. One format for SFT, reward model and PPO."""

    human: str
    """Template of a user's turn with `{text}`."""
    assistant: str
    """What opens an answer."""
    end_of_turn: str | None
    """Token that ends an answer; None: the tokenizer's EOS. Added as a special token where it is missing."""

    def __post_init__(self) -> None:
        require("{text}" in self.human, f"human must contain {{text}}, got {self.human!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, in which proportions, cut how long."""

    sources: list[Any]
    """Names from the table in rlhf/data/sources.py, or rows written out as mappings."""
    path: str | None
    """The file that the generic sources (pairs, text, labelled, ...) read."""
    sft_only: list[Any]
    """Sources with one answer a prompt: all their rows go to SFT."""
    ptx: list[Any]
    """Sources of plain text for the pre-training loss mixed into PPO."""
    split: list[float]
    """Shares of the rows for SFT, reward model and PPO; disjoint, drawn with `split_seed`."""
    split_seed: int
    eval_fraction: float
    """Held out of a source that has no evaluation split of its own."""
    max_rows: int | None
    """Takes the first rows of each source after a seeded shuffle. None: all."""
    shuffle_preferences: bool
    """Swaps chosen and rejected at random: a control that must not learn."""
    gold: str | None
    """Import path of the task's true score, where it has one: `f(prompts, answers, ended) -> list of floats`. Training never sees it."""
    chat: ChatFormat
    max_prompt_tokens: int
    max_answer_tokens: int
    overlong: Literal["drop", "cut"]
    """A row longer than the two limits is dropped and counted, or its answer is cut (then without an end of turn)."""
    length_bucket: int
    """Padded lengths are rounded up to a multiple of this."""
    cache_dir: str | None
    """None: the user's cache folder."""
    workers: int

    def __post_init__(self) -> None:
        require(len(self.split) == 3 and sum(self.split) > 0 and min(self.split) >= 0, f"split must be three shares, got {self.split}")
        require(self.overlong in ("drop", "cut"), f"overlong must be drop or cut, got {self.overlong}")
        require_in("eval_fraction", self.eval_fraction, 0, 0.9)
        require_in("workers", self.workers, 0)
        require_at_least_one(
            max_prompt_tokens=self.max_prompt_tokens, max_answer_tokens=self.max_answer_tokens, length_bucket=self.length_bucket
        )
        require(self.max_rows is None or self.max_rows >= 1, f"max_rows must be at least 1, got {self.max_rows}")
        require(bool(self.sources or self.sft_only), "sources is empty: name at least one source")
