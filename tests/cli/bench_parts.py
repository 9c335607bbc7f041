"""What the tests of `rlhf bench` measure with: a strategy of one rank, an engine that may be wrong, and the command as a process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import VOCAB

from rlhf.engines.baselines import Vocabulary
from rlhf.engines.bench_parity import answer_logprobs
from rlhf.engines.generation import HFGenerate
from rlhf.types import PromptBatch, Rollout

HERE = Path(__file__).parent
CPU = torch.device("cpu")
WORDS = Vocabulary(size=VOCAB, end=2, pad=3, special=frozenset({1, 2, 3}))


class OneRank:
    """What the measurements ask of a strategy, around one network."""

    root_device, world_size, global_rank = CPU, 1, 0

    def __init__(self, network: Any) -> None:
        self._network = network

    def network(self, role: str) -> Any:
        return self._network

    @contextmanager
    def whole(self, role: str) -> Iterator[Any]:
        yield self._network

    def barrier(self) -> None: ...

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values

    max_over_ranks = sum_over_ranks


class Answers(HFGenerate):
    """transformers, with log-probabilities; `shift` is how far those of the last row are off, in nats."""

    shift = 0.0

    def generate(self, role: str, prompts: PromptBatch, *, samples: int) -> Rollout:
        rollout = super().generate(role, prompts, samples=samples)
        logprobs = answer_logprobs(self.strategy.network(role), rollout).detach()
        logprobs[-1] += self.shift
        return dataclasses.replace(rollout, logprobs=logprobs)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
