"""What `rlhf bench` measures: rollouts, whether the fast engine agrees with transformers, whole PPO iterations, and the machine.

Types and ranges only: the values live in conf/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.settings.plan import EfficiencyConfig
from rlhf.settings.ranges import require, require_at_least_one, require_in
from rlhf.settings.roles import OptimizerConfig, SchedulerConfig

ENGINES = ("hybrid", "hf_dynamic", "hf_static")
DTYPES = ("fp32", "bf16", "fp16")
BASELINES = ("hf_generate", "hybrid_engine")


def _require_some(name: str, values: list[Any]) -> None:
    require(len(values) > 0, f"{name} is empty: name at least one")
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    require(not twice, f"{name} names {twice[0] if twice else ''} twice")


def _require_among(name: str, values: list[Any], choices: tuple[Any, ...]) -> None:
    _require_some(name, values)
    for value in values:
        require(value in choices, f"{name} must name some of {', '.join(map(str, choices))}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RolloutBenchConfig:
    """Rollouts timed: this project's engine, transformers' generate, and the physical floor."""

    batch_sizes: list[int]
    """Sequences that one rank generates at once; one measurement each."""
    prompt_tokens: int
    new_tokens: int
    """Length of every answer; with geometric lengths the longest."""
    engines: list[str]
    """Some of hybrid, hf_dynamic (generate with a growing cache), hf_static (with a static cache; it compiles itself)."""
    hf_static_on_cpu: bool
    """Measures hf_static on a CPU too, where transformers does not compile for it, so that it is no faster than hf_dynamic."""
    warmup: int
    """Rollouts of each measurement that are not counted."""
    repeats: int
    """Rollouts of each measurement that are; the median is reported."""
    answer_lengths: Literal["fixed", "geometric"]
    """fixed: every answer has `new_tokens`. geometric: also a run of the hybrid engine with a limit drawn for every answer."""
    mean_new_tokens: float
    """Geometric lengths: their mean before they are cut at `new_tokens`."""
    prompts: int
    """Geometric lengths: prompts of one rank, which go through as many slots as the batch size says."""
    seed: int
    """Of prompts and lengths."""

    def __post_init__(self) -> None:
        _require_some("batch_sizes", self.batch_sizes)
        for size in self.batch_sizes:
            require_at_least_one(batch_sizes=size)
        require_at_least_one(prompt_tokens=self.prompt_tokens, repeats=self.repeats, prompts=self.prompts)
        require(self.new_tokens >= 2, f"new_tokens must be at least 2, got {self.new_tokens}")
        _require_among("engines", self.engines, ENGINES)
        require_in("warmup", self.warmup, 0)
        require_in("mean_new_tokens", self.mean_new_tokens, 1)
        require_in("seed", self.seed, 0)
        require(
            self.answer_lengths == "fixed" or "hybrid" in self.engines,
            f"answer_lengths=geometric runs on the hybrid engine alone, but engines={self.engines} does not name it",
        )


@dataclass(frozen=True, kw_only=True)
class ParityBenchConfig:
    """The hybrid engine against transformers, for every combination of the lists."""

    families: list[str]
    """Names from `shapes`. Empty: the one model of the actor."""
    shapes: dict[str, Any]
    """Name -> keywords of a transformers config, `model_type` included: small networks with random weights."""
    dtypes: list[str]
    """Some of fp32, bf16, fp16."""
    zero_stages: list[int]
    tp_sizes: list[int]
    lora_ranks: list[int]
    """0: no adapters. What else adapters need comes from `actor.lora`."""
    graphs: list[bool]
    """CUDA graphs off and on."""
    prompts: int
    """Prompts of one rank, of mixed length."""
    prompt_tokens: int
    """Length of the longest."""
    new_tokens: int
    train_steps: int
    """Optimizer steps on random tokens before the comparison; 0: the actor is frozen (ZeRO 0 and 3 only)."""
    logprob_tolerance: float
    """fp32: largest difference of a token's log-probability, in nats."""
    error_ratio: float
    """16 bits: the engine's mean error against an fp32 reference may be so many times that of transformers in 16 bits."""
    seed: int
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig

    def __post_init__(self) -> None:
        for name, shape in self.shapes.items():
            require(isinstance(shape, dict) and "model_type" in shape, f"shapes.{name} must be a mapping with a model_type")
        if self.families:
            _require_among("families", self.families, tuple(self.shapes))
        _require_among("dtypes", self.dtypes, DTYPES)
        _require_among("zero_stages", self.zero_stages, (0, 1, 2, 3))
        _require_among("graphs", self.graphs, (False, True))
        for name in ("tp_sizes", "lora_ranks"):
            _require_some(name, getattr(self, name))
        for size in self.tp_sizes:
            require_at_least_one(tp_sizes=size)
        for rank in self.lora_ranks:
            require_in("lora_ranks", rank, 0)
        require_at_least_one(prompts=self.prompts, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens)
        require_in("train_steps", self.train_steps, 0)
        require_in("seed", self.seed, 0)
        require(self.logprob_tolerance > 0, f"logprob_tolerance must be positive, got {self.logprob_tolerance}")
        require(self.error_ratio >= 1, f"error_ratio must be at least 1, got {self.error_ratio}")


@dataclass(frozen=True, kw_only=True)
class StepBenchConfig:
    """Whole PPO iterations timed by phase, beside the physical floor and what the planner predicts."""

    prompt_tokens: int
    """Length of every prompt, random token ids."""
    new_tokens: int
    """Length of every answer."""
    warmup: int
    """Iterations that are not counted, with each rollout engine."""
    iterations: int
    """Iterations that are; the one of median length is reported."""
    baselines: list[str]
    """Rollout engines that the same step is measured with afterwards, in the same run: some of hf_generate, hybrid_engine."""
    efficiency: EfficiencyConfig
    """What the prediction takes this machine to reach."""

    def __post_init__(self) -> None:
        require_at_least_one(prompt_tokens=self.prompt_tokens, warmup=self.warmup, iterations=self.iterations)
        require(self.new_tokens >= 2, f"new_tokens must be at least 2, got {self.new_tokens}")
        if self.baselines:
            _require_among("baselines", self.baselines, BASELINES)


@dataclass(frozen=True, kw_only=True)
class CalibrateSizes:
    """Large enough for a device's full rate, small enough to take seconds."""

    copy_mb: int
    """Of a copy within device memory, 10^6 bytes."""
    matmul_width: int
    """Of a square matrix product in 16 bits."""
    collective_mb: int
    """What each rank contributes to a collective, 10^6 bytes; several ranks only."""

    def __post_init__(self) -> None:
        require_at_least_one(copy_mb=self.copy_mb, matmul_width=self.matmul_width, collective_mb=self.collective_mb)


@dataclass(frozen=True, kw_only=True)
class CalibrateBenchConfig:
    """The machine measured for the planner."""

    warmup: int
    """Calls of each measurement that are not counted."""
    repeats: int
    """Calls that are; the median counts."""
    launches: int
    """Small operations in a row whose launch is timed."""
    transfer_mb: int
    """GPU only: size of a copy between the device and pinned host memory, 10^6 bytes."""
    gpu: CalibrateSizes
    """Read where a GPU is measured."""
    cpu: CalibrateSizes
    """Read where a CPU is."""

    def __post_init__(self) -> None:
        require_in("warmup", self.warmup, 0)
        require_at_least_one(repeats=self.repeats, launches=self.launches, transfer_mb=self.transfer_mb)
