"""Timing whole rollouts: engine by engine, batch by batch, everything included, beside the floor of this machine.

Knows engines and clocks; knows no terminal and no files. B sequences of one rank.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.engines.baselines import HFStatic, Vocabulary, geometric_lengths, random_prompts
from rlhf.engines.floor import ModelSize, copy_bandwidth, decode_floor, matmul_rate, prefill_floor, synchronize
from rlhf.engines.generation import HFGenerate, RolloutEngine
from rlhf.engines.hybrid import HybridEngine
from rlhf.engines.strategy import RoleStrategy
from rlhf.settings import RolloutBenchConfig, RolloutConfig
from rlhf.types import PromptBatch


@dataclass(kw_only=True)
class Row:
    """One measurement. Times are those of the slowest rank, tokens those of all ranks, memory that of rank zero."""

    engine: str
    batch: int
    """Sequences at once on one rank."""
    lengths: str
    seconds: float
    """Median rollout; nan where `note` says why there is none."""
    all_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    """Answer tokens of one rollout."""
    floor_seconds: float | None = None
    """What the same rollout takes at least; fixed lengths only."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds by part of the median rollout, as the engine tells."""
    peak_bytes: int | None = None
    """Most memory held by tensors during the rollouts; CUDA only."""
    free_bytes: int | None = None
    """What the device still has free after them; CUDA only."""
    capture_seconds: float | None = None
    note: str = ""
    ratios: dict[str, float] = field(default_factory=dict)
    """Speed as a share of the floor (`of_floor`), over a baseline's (`vs_hf_dynamic`), or of the fixed-length figure (`of_fixed`)."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Rates:
    """Measured on this device, in this run."""

    bandwidth: float
    """Bytes/s of a copy, read and write both counted."""
    matmul: float
    """Operations/s."""


def hybrid_engine(strategy: RoleStrategy, rollout: RolloutConfig, words: Vocabulary, *, tp: int) -> RolloutEngine:
    """The engine under test; strict, so that no fallback is measured in its place."""
    rollout = dataclasses.replace(rollout, engine="hybrid_engine", strict=True)
    return HybridEngine(strategy, rollout, end_id=words.end, pad_id=words.pad, tp=tp)


class RolloutBench:
    """Runs the measurements of a `RolloutBenchConfig`; collective, with the same calls on every rank.

    Args:
        rollout: how answers are sampled; lengths and slots are the measurement's own.
        on_row: hears the rows so far after each measurement, so that a later one that fails loses none.
    """

    def __init__(
        self, strategy: RoleStrategy, rollout: RolloutConfig, bench: RolloutBenchConfig, *, size: ModelSize, words: Vocabulary,
        dtype: torch.dtype, tp: int, on_row: Callable[[list[Row], Rates], None],
    ) -> None:  # fmt: skip
        self.strategy, self.bench, self.size, self.words, self.tp, self.on_row = strategy, bench, size, words, tp, on_row
        self.device: torch.device = strategy.root_device
        self.rates = Rates(copy_bandwidth(self.device), matmul_rate(self.device, dtype))
        longest = bench.prompt_tokens + bench.new_tokens
        self.rollout = dataclasses.replace(
            rollout, engine="hf_generate", strict=False, max_new_tokens=bench.new_tokens, min_new_tokens=bench.new_tokens,
            max_out_tokens=longest if rollout.max_out_tokens is None else rollout.max_out_tokens,
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(bench.seed + 7919 * strategy.global_rank)
        self.rows: list[Row] = []

    def run(self) -> list[Row]:
        for batch in self.bench.batch_sizes:
            for engine in self.bench.engines:
                self._add(self._fixed(engine, batch))
            if self.bench.answer_lengths == "geometric":
                self._add(self._geometric(batch))
        return self.rows

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        for other in self.rows:
            if other.batch == row.batch:
                other.ratios = ratios(other, self.rows)
        self.on_row(self.rows, self.rates)

    def floor(self, engine: str, batch: int) -> float:
        """Seconds of a fixed-length rollout at best: decode and prefill. Only the hybrid engine shares weights between ranks."""
        prompt, tp = self.bench.prompt_tokens, self.tp if engine == "hybrid" else 1
        decode = decode_floor(self.size, batch=batch, prompt=prompt, new=self.bench.new_tokens, bandwidth=self.rates.bandwidth, tp=tp)
        return decode + prefill_floor(self.size, batch=batch, prompt=prompt, rate=self.rates.matmul)

    def _engine(self, name: str, rollout: RolloutConfig) -> RolloutEngine:
        if name == "hybrid":
            return hybrid_engine(self.strategy, rollout, self.words, tp=self.tp)
        kind = HFStatic if name == "hf_static" else HFGenerate
        return kind(self.strategy, rollout, end_id=self.words.end, pad_id=self.words.pad)

    def _prompts(self, count: int) -> PromptBatch:
        lengths = torch.full((count,), self.bench.prompt_tokens)  # (B,)
        return random_prompts(self.words, lengths, self.generator, self.device)

    def _fixed(self, engine: str, batch: int) -> Row:
        row = Row(engine=engine, batch=batch, lengths="fixed", seconds=float("nan"), floor_seconds=self.floor(engine, batch))
        if engine == "hf_static" and self.device.type == "cpu" and not self.bench.hf_static_on_cpu:
            row.note = "skipped on a CPU (bench.hf_static_on_cpu=true measures it)"
            return row
        self._measure(row, self._engine(engine, self.rollout), self._prompts(batch), {}, batch * self.bench.new_tokens)
        return row

    def _geometric(self, batch: int) -> Row:
        """Prompts through as many slots as the batch has, each answer with a limit of its own; the limits count as useful tokens."""
        bench = self.bench
        limits = geometric_lengths(bench.prompts, mean=bench.mean_new_tokens, longest=bench.new_tokens, generator=self.generator)
        engine = self._engine("hybrid", dataclasses.replace(self.rollout, micro_batch_size=batch))
        row = Row(engine="hybrid", batch=batch, lengths="geometric", seconds=float("nan"))
        self._measure(row, engine, self._prompts(bench.prompts), {"limits": limits.to(self.device)}, int(limits.sum()))
        return row

    def _measure(self, row: Row, engine: Any, prompts: PromptBatch, options: dict[str, Tensor], expected: int) -> None:
        """Fills a row. Alone on its device, a rank that runs out of memory says so and goes on.

        Raises:
            RuntimeError: an engine gave another number of tokens than it was asked for.
        """
        try:
            self._repeat(row, engine, prompts, options, expected)
        except torch.cuda.OutOfMemoryError:
            if self.strategy.world_size > 1:
                raise  # the others wait in a collective
            row.note = "out of memory"
        finally:
            getattr(engine, "close", lambda: None)()
            del engine
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _repeat(self, row: Row, engine: Any, prompts: PromptBatch, options: dict[str, Tensor], expected: int) -> None:
        runs: list[tuple[float, dict[str, float]]] = []
        for call in range(self.bench.warmup + self.bench.repeats):
            if call == self.bench.warmup and self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.strategy.barrier()
            synchronize(self.device)
            start = time.perf_counter()
            answers = engine.generate("actor", prompts, samples=1, **options)
            synchronize(self.device)
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self.device)
            tokens = int(answers.lengths.sum())
            if tokens != expected:
                raise RuntimeError(f"{row.engine} gave {tokens} tokens instead of {expected}: its figures would compare with nothing")
            if call >= self.bench.warmup:
                runs.append((float(self.strategy.max_over_ranks(seconds)), dict(getattr(engine, "timings", {}))))
        row.all_seconds = [seconds for seconds, _ in runs]
        row.seconds, row.parts = sorted(runs, key=lambda run: run[0])[(len(runs) - 1) // 2]
        row.tokens = int(self.strategy.sum_over_ranks(torch.tensor(expected, device=self.device)))
        row.capture_seconds = getattr(engine, "capture_seconds", None)
        if self.device.type == "cuda":
            row.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            row.free_bytes = torch.cuda.mem_get_info(self.device)[0]


def ratios(row: Row, rows: list[Row]) -> dict[str, float]:
    """A row's speed beside the floor, the baselines of the same batch and (geometric) the same engine at fixed lengths."""
    if not row.tokens:
        return {}
    fixed = {other.engine: other for other in rows if other.batch == row.batch and other.lengths == "fixed" and other.tokens}
    if row.lengths == "geometric":
        return {"of_fixed": row.tokens_per_s / fixed["hybrid"].tokens_per_s} if "hybrid" in fixed else {}
    found = {} if row.floor_seconds is None else {"of_floor": row.floor_seconds / row.seconds}
    for name in ("hf_dynamic", "hf_static"):
        if name in fixed and name != row.engine:
            found[f"vs_{name}"] = row.tokens_per_s / fixed[name].tokens_per_s
    return found
