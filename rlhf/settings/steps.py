"""The supervised steps of the recipe, rollouts and evaluation; `ppo.py` has PPO.

Types and ranges only: the values live in conf/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.settings.ranges import require, require_at_least_one, require_in, require_one_of
from rlhf.settings.roles import OptimizerConfig, SchedulerConfig


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Sizes that every supervised step has."""

    epochs: float
    batch_size: int
    """Examples of one optimizer step, over all ranks."""
    micro_batch_size: int | None
    """Examples of one forward pass on one rank. None: the rank's whole share of the batch."""
    max_steps: int | None
    """Stops after so many optimizer steps. None: after `epochs`."""
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig

    def __post_init__(self) -> None:
        require(0 < self.epochs <= 1e6, f"epochs must lie in (0, 1e6], got {self.epochs}")
        optional = {name: getattr(self, name) for name in ("micro_batch_size", "max_steps")}
        require_at_least_one(batch_size=self.batch_size, **{name: value for name, value in optional.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class SFTConfig(StepConfig):
    loss_on: Literal["answer", "all"]
    """Which tokens are trained: the answer's, or the prompt's as well (as DeepSpeed-Chat does)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss_on in ("answer", "all"), f"loss_on must be answer or all, got {self.loss_on}")


@dataclass(frozen=True, kw_only=True)
class RewardTrainingConfig(StepConfig):
    loss: Literal["end", "tokens"]
    """Pairwise loss on the score at the last token, or on every token from the first difference on (as DeepSpeed-Chat)."""
    head_init: Literal["normal", "uniform", "zeros"]
    """The head before the first step. normal: that of the weights, and where they have none, standard deviation 1/sqrt(D + 1). The others
    replace any head: uniform in +-1/sqrt(D), zeros."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss in ("end", "tokens"), f"loss must be end or tokens, got {self.loss}")
        require_one_of("head_init", self.head_init, ("normal", "uniform", "zeros"))


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How answers are sampled, and by what. Keys marked hybrid_engine act with that engine only."""

    engine: Literal["hybrid_engine", "hf_generate", "recorded"]
    strict: bool
    """True: a family that the hybrid engine has no map of weights for is an error. False: a warning, and transformers' generate."""
    temperature: float
    """0 is greedy."""
    top_k: int
    """0: off."""
    top_p: float
    max_new_tokens: int
    min_new_tokens: int
    micro_batch_size: int | None
    """Sequences generated at once on one rank; the hybrid engine keeps so many slots and refills those that are free. None: all of them."""
    max_out_tokens: int | None
    """hybrid_engine: prompt and answer tokens that the KV cache holds for one sequence. None: data.max_prompt_tokens + max_new_tokens."""
    prefill_tokens: int
    """hybrid_engine: prompt tokens of one prefill pass."""
    cuda_graphs: bool
    """hybrid_engine, on a GPU: decoding steps are captured once and replayed."""
    release_inference_cache: bool
    """hybrid_engine: the KV cache's memory is given back between rollouts."""
    pin_parameters: bool
    """hybrid_engine: the memory of the inference weights is kept between rollouts."""
    tp_gather_partition_size: int
    """hybrid_engine: layers that are gathered at once under ZeRO-3."""
    recorded_path: str | None
    """Folder of rollouts saved by `save_to`, for engine=recorded."""
    save_to: str | None
    """Saves every rollout here, so that a learner can be run again on the same answers."""

    def __post_init__(self) -> None:
        engines = ("hybrid_engine", "hf_generate", "recorded")
        require(self.engine in engines, f"engine must be hybrid_engine, hf_generate or recorded, got {self.engine}")
        require(
            not self.strict or self.engine == "hybrid_engine",
            f"strict=true goes with engine=hybrid_engine only, got engine={self.engine}: choose rollout=hybrid_engine or strict=false",
        )
        for name in ("temperature", "top_k", "min_new_tokens"):
            require_in(name, getattr(self, name), 0)
        cold = f"temperature must be 0 (the likeliest token) or at least 0.001, got {self.temperature}"
        require(self.temperature == 0 or self.temperature >= 1e-3, cold)
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        require_at_least_one(
            max_new_tokens=self.max_new_tokens, prefill_tokens=self.prefill_tokens, tp_gather_partition_size=self.tp_gather_partition_size
        )
        require(self.min_new_tokens <= self.max_new_tokens, f"min_new_tokens must not pass max_new_tokens, got {self.min_new_tokens}")
        for name in ("micro_batch_size", "max_out_tokens"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(self.engine != "recorded" or self.recorded_path is not None, "recorded_path is needed for engine=recorded")


@dataclass(frozen=True, kw_only=True)
class TensorParallelConfig:
    size: int
    """Ranks that share one copy of the actor during rollouts."""

    def __post_init__(self) -> None:
        require_at_least_one(size=self.size)


RESERVED_NAMES = ("accuracy", "margin", "calibration_error", "prompt", "fixed")
"""Policies are not called so: metrics and columns of samples.jsonl are."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out comparison of two policies with the same sampling."""

    names: list[str]
    """What the two policies are called in metrics: the one before (`ref`), then the one after (`actor`)."""
    prompts: int
    """Held-out prompts that both policies answer; 0: none."""
    samples: int
    """Answers to each of these prompts."""
    pairs: int
    """Held-out pairs on which the reward model is judged; 0: none."""
    texts: int
    """Held-out demonstrations on which perplexity is measured; 0: none."""
    fixed_prompts: str | None
    """Prompts that both policies answer side by side: `english`, `chinese`, `japanese`, or a file of one's own. None: none."""
    win_rate: list[str] | None
    """Judges that say how often the policy after beats the one before, `reward` and `gold`. None: all that there are."""
    base: str | None
    """Run directory or folder of a third policy to which the KL of both is measured. None: none."""
    show: int | None
    """Answers that the terminal shows below the table. None: neither table nor answers."""
    batch_size: int
    """Rows of one batch, over all ranks."""
    gold: str | None
    """Import path of a scorer the training never sees: f(prompts, answers, ended) -> list of floats."""
    gold_kwargs: dict[str, Any]
    """Keywords for `gold` when it names a class: it is built once, then called."""
    seed: int

    def __post_init__(self) -> None:
        for name in ("prompts", "pairs", "texts"):
            require_in(name, getattr(self, name), 0)
        require_at_least_one(batch_size=self.batch_size, samples=self.samples)
        require(self.show is None or self.show >= 0, f"show must not be negative, got {self.show}")
        judges = self.win_rate or []
        require(
            set(judges) <= {"reward", "gold"} and len(set(judges)) == len(judges),
            f"win_rate must name reward, gold or both, once each, got {judges}",
        )
        require(
            self.gold is not None or not self.gold_kwargs, f"gold_kwargs are for evaluation.gold, which is null: got {self.gold_kwargs}"
        )
        taken = [name for name in self.names if name in RESERVED_NAMES or "/" in name]
        require(not taken, f"names must be free of '/' and none of {', '.join(RESERVED_NAMES)}, got {self.names}")
        require(len(self.names) == 2 and self.names[0] != self.names[1], f"names must be two different names, got {self.names}")
