"""Measuring whole training iterations from outside: a strategy that says what its engines are doing, and the prompts they are fed.

Knows engines and clocks; knows no loss, no terminal and no files. B prompts of one rank, P prompt tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from rlhf.engines.baselines import Vocabulary, random_prompts
from rlhf.engines.strategy import RoleStrategy, StepResult
from rlhf.inference.arena import mapped_memory
from rlhf.types import PromptBatch


@dataclass
class Spans:
    """Seconds and peak memory of named parts of an iteration. On a GPU they are measured by events and nothing is waited for; a part whose
    work overlaps another's counts what its stream took."""

    cuda: bool
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes that PyTorch had allocated at most, and what the hybrid engine had mapped; CUDA only."""
    phase: str = ""
    """What the module's clock says; parts lie within phases."""
    phase_peaks: dict[str, int] = field(default_factory=dict)
    """By phase, what its own meter misses: every part begins a measurement of the peak of its own."""
    _open: dict[str, Any] = field(default_factory=dict)
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)

    def begin(self, name: str) -> None:
        """Nothing if the part is open already: a micro-batch may call its network more than once."""
        if name in self._open:
            return
        self._look()
        self._open[name] = self._now()

    def end(self, name: str) -> None:
        began = self._open.pop(name, None)
        if began is None:
            return
        peak = self._look()
        if self.cuda:
            self._events.append((name, began, self._now()))
            self.peaks[name] = max(self.peaks.get(name, 0), peak)
        else:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - began

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.begin(name)
        yield
        self.end(name)

    def drain(self) -> tuple[dict[str, float], dict[str, int]]:
        """Seconds of the parts, and peaks of parts and phases, since the last call; waits for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds, peaks = dict(self.seconds), {**self.peaks, **self.phase_peaks}
        for name, begin, end in self._events:
            seconds[name] = seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        self.seconds, self.peaks, self.phase_peaks, self._open, self._events = {}, {}, {}, {}, []
        return seconds, peaks

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _look(self) -> int:
        if not self.cuda:
            return 0
        peak = torch.cuda.max_memory_allocated() + mapped_memory.most
        torch.cuda.reset_peak_memory_stats()
        mapped_memory.restart()
        self.phase_peaks[self.phase] = max(self.phase_peaks.get(self.phase, 0), peak)
        return peak


class MeasuredStrategy(RoleStrategy):
    """The strategy of every training run, which also keeps the time of its roles: `score ROLE` is a forward pass that nothing is learned from,
    `train ROLE` goes from the forward pass to the end of its backward pass, `optimizer` is `step`."""

    spans: Spans

    def connect(self, model: Any) -> None:
        """Unsharded weights are made where they are used: nobody compares a benchmark's random weights, and a GPU draws them at once."""
        super().connect(model)
        inherited = model.sharded
        model.sharded = lambda role: inherited(role) if self.specs[role].stage == 3 else self.root_device

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        self.spans = Spans(cuda=self.root_device.type == "cuda")
        for role in self.specs:
            self._watch(role)

    def _watch(self, role: str) -> None:
        network = self.network(role)

        def before(module: Any, inputs: Any) -> None:
            self.spans.begin(f"{'train' if torch.is_grad_enabled() else 'score'} {role}")

        def after(module: Any, inputs: Any, output: Any) -> None:
            self.spans.end(f"score {role}")

        network.register_forward_pre_hook(before)
        network.register_forward_hook(after)

    def backward(self, role: str, loss: torch.Tensor) -> None:  # type: ignore[override]
        super().backward(role, loss)
        self.spans.end(f"train {role}")

    def step(self, *roles: str) -> dict[str, StepResult]:
        with self.spans("optimizer"):
            return super().step(*roles)


class RandomPrompts(L.LightningDataModule):
    """In the place of a run's rows: the same number of random prompts in every iteration, all of the same length.

    `start`, `report` and `total_steps` are what training asks of its data.
    """

    def __init__(
        self, words: Vocabulary, *, batch_size: int, prompt_tokens: int, iterations: int, seed: int, rank: int, world: int
    ) -> None:
        """
        Args:
            batch_size: prompts of an iteration, over all ranks.
        """
        super().__init__()
        self.batch_size, self.total_steps, self.start = batch_size, iterations, 0
        self.report: dict[str, int] = {}
        generator = torch.Generator().manual_seed(seed + 7919 * rank)
        lengths = torch.full((batch_size // world,), prompt_tokens)  # (B,)
        self.batches = [random_prompts(words, lengths, generator, torch.device("cpu")) for _ in range(iterations)]

    def train_dataloader(self) -> DataLoader[PromptBatch]:
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's own error, or a library's that says the same in words."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "short of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def slowest(strategy: RoleStrategy, seconds: dict[str, float], key: str) -> dict[str, float]:
    """`seconds` of the rank whose `key` is largest, on every rank: parts of one rank add up, those of several do not. Collective."""
    return max(strategy.gather_objects(seconds), key=lambda one: one[key])


def largest(strategy: RoleStrategy, sizes: dict[str, int]) -> dict[str, int]:
    """The largest of each name over all ranks. Collective."""
    every = strategy.gather_objects(sizes)
    return {name: max(one.get(name, 0) for one in every) for name in sizes}
