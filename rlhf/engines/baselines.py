"""What the hybrid engine is measured against, and the prompts both answer.

Knows transformers' generate; knows no clock. B prompts, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.engines.generation import HFGenerate
from rlhf.types import PromptBatch, Rollout


class HFStatic(HFGenerate):
    """`model.generate` with a static cache, for which transformers compiles the model on CUDA."""

    def generate(self, role: str, prompts: PromptBatch, *, samples: int) -> Rollout:
        network: Any = self.strategy.network(role)
        settings = network.model.generation_config
        settings.cache_implementation = "static"
        try:
            return super().generate(role, prompts, samples=samples)
        finally:
            settings.cache_implementation = None

    def close(self) -> None:
        """Forgets what transformers has compiled and captured for a batch size: it holds memory that the next engine is measured with."""
        model = self.strategy.network("actor").model
        for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
            vars(model).pop(name, None)
        torch.compiler.reset()


class Alone:
    """A network outside any engine, in the place of a strategy for `HFGenerate`."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def network(self, role: str) -> nn.Module:
        return self._network

    @contextmanager
    def whole(self, role: str) -> Iterator[nn.Module]:
        yield self._network


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Which token ids a measurement may use."""

    size: int
    end: int
    pad: int
    special: frozenset[int]
    """Never part of a prompt."""


def vocabulary(config: Any) -> Vocabulary:
    """Of a transformers config. Without an end of turn of its own (a model whose tokenizer would bring it) the last id takes its place."""
    ends = config.eos_token_id
    end = ends[0] if isinstance(ends, list) else config.vocab_size - 1 if ends is None else ends
    pad = end if config.pad_token_id is None else config.pad_token_id
    named = {config.bos_token_id, end, pad, *(ends if isinstance(ends, list) else [])}
    return Vocabulary(size=config.vocab_size, end=end, pad=pad, special=frozenset(x for x in named if x is not None))


def random_prompts(words: Vocabulary, lengths: Tensor, generator: torch.Generator, device: torch.device) -> PromptBatch:
    """Random ids without special ones, padded on the left to the longest. `lengths` is (B,) int64, on the CPU like the generator."""
    plain = torch.tensor([i for i in range(words.size) if i not in words.special])  # (V')
    width = int(lengths.max())
    ids = plain[torch.randint(len(plain), (len(lengths), width), generator=generator)]  # (B, P)
    mask = torch.arange(width) >= width - lengths[:, None]  # (B, P)
    ids = ids.masked_fill(~mask, words.pad)
    return PromptBatch(ids=ids.to(device), mask=mask.to(device), index=torch.arange(len(ids), device=device), texts=[""] * len(ids))


def geometric_lengths(count: int, *, mean: float, longest: int, generator: torch.Generator) -> Tensor:
    """(count,) int64 lengths from 1 on with P(n) = (1 - p)^(n - 1) p and p = 1 / mean, cut at `longest`. On the CPU."""
    drawn = torch.empty(count).geometric_(min(1.0, 1 / mean), generator=generator) if mean > 1 else torch.ones(count)
    return drawn.long().clamp(max=longest)
