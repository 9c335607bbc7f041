"""What `rlhf plan` answers, the check of memory that training verbs run first, and how fast the model of time takes things to be.

Types and ranges only: the values live in conf/base.yaml, conf/plan and conf/efficiency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.settings.ranges import require, require_at_least_one, require_in, require_one_of


@dataclass(frozen=True, kw_only=True)
class PlanCheckConfig:
    """Every verb has these: what the memory model takes for what no formula gives, and whether its verdict counts."""

    enforce: bool
    """A training verb on GPUs refuses a run that cannot fit into `hardware`."""
    context_gb: float
    """CUDA context, libraries' workspaces and captured graphs of one GPU, 10^9 bytes."""
    communication_gb: float
    """NCCL's buffers of one GPU where there is more than one rank, 10^9 bytes."""
    fragmentation: float
    """Memory that PyTorch holds beside what is allocated, as a share of it."""
    process_gb: float
    """Host memory of one rank's process, 10^9 bytes."""

    def __post_init__(self) -> None:
        for name in ("context_gb", "communication_gb", "fragmentation", "process_gb"):
            require_in(name, getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class EfficiencyConfig:
    """What an engine gets out of the hardware, as shares of its data sheet and as fixed costs."""

    name: str
    training: float
    """Share of the 16-bit matrix rate that forward and backward passes of training reach."""
    forward: float
    """The same of scoring and of prefill."""
    memory: float
    """Share of the memory bandwidth that decoding, copies and the optimizer reach."""
    decode_layer_us: float
    """Decoding: microseconds of each layer and step beside reading memory."""
    decode_cache_passes: float
    """Decoding: how often a step moves the live part of the KV cache."""
    hf_layer_us: float
    """`decode_layer_us` of transformers' generate."""
    hf_adapter_us: float
    """Decoding by transformers' generate: microseconds of each matrix with an adapter and step, which is not folded in there."""
    hf_cache_passes: float
    """`decode_cache_passes` of transformers' generate."""
    eager_layer_us: float
    """Training and scoring: microseconds that a layer's forward pass takes at least, however small the batch."""
    logit_bytes: float
    """Scoring: bytes that are moved for each logit of an answer until its log-probabilities are there, copies in fp32 included."""
    logit_training_bytes: float
    """The same of training, forward and backward."""
    adapter_moves: float
    """LoRA: elements read and written in a forward pass for each output of an adapted matrix: the adapter's, scaled, added."""
    gradient_tensor_us: float
    """Training: microseconds that the engine's hooks take for each trained tensor in a backward pass."""
    optimizer_tensor_us: float
    """Microseconds of each trained tensor in a step of the optimizer, beside the memory it moves."""
    optimizer_extra_bytes: float
    """Bytes a trained parameter that a step moves beside the state: the norm in fp64, clipping."""
    pads_heads: bool
    """Decoding: attention works on heads as wide as the next power of two."""
    zero3_tensor_us: float
    """ZeRO-3 module by module: microseconds that fetching and releasing takes for each tensor in a pass, however few ranks there are."""
    zero3_layer_tensor_us: float
    """The same where a layer is made whole at once (`zero.gather_layers`)."""
    link: float
    """Share of the link between devices that a large collective reaches."""
    network: float
    """The same of the network between nodes."""
    overlap: float
    """Share of gradient and parameter traffic that computing hides."""
    collective_us: float
    """Microseconds of a collective however small."""
    host_link: float
    """Share of the link to the host that offloading reaches."""
    host_adam_gbs: float
    """Bytes that Adam on a node's host moves, 10^9 a second."""
    iteration_ms: float
    """Milliseconds of an iteration for all that no phase counts."""

    def __post_init__(self) -> None:
        for name in ("training", "forward", "memory", "link", "network", "host_link"):
            require(0 < getattr(self, name) <= 1, f"{name} must lie in (0, 1], got {getattr(self, name)}")
        require_in("overlap", self.overlap, 0, 1)
        costs = (
            "decode_layer_us", "hf_layer_us", "hf_adapter_us", "eager_layer_us", "logit_bytes", "logit_training_bytes", "adapter_moves", "gradient_tensor_us", "optimizer_tensor_us", "optimizer_extra_bytes",
            "zero3_tensor_us", "zero3_layer_tensor_us", "collective_us", "iteration_ms",
        )  # fmt: skip
        for name in costs:
            require_in(name, getattr(self, name), 0)
        require_at_least_one(decode_cache_passes=self.decode_cache_passes, hf_cache_passes=self.hf_cache_passes)  # type: ignore[arg-type]
        require(self.host_adam_gbs > 0, f"host_adam_gbs must be positive, got {self.host_adam_gbs}")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PlanCheckConfig):
    """What `rlhf plan` is asked. Of `enforce` it says what it would do to the training verb."""

    step: Literal["sft", "reward", "ppo", "dpo", "pipeline"]
    """The verb that is planned; pipeline: sft, reward and ppo after each other."""
    search: bool
    """Also looks for the fastest sharding, micro-batches, checkpointing and tensor parallelism that fit; batch and LoRA stay."""
    json: bool
    """Prints JSON instead of tables."""
    samples: int | None
    """Sequences of the whole run, for hours and dollars. None: what `ppo.iterations` or the step's `max_steps` says, if anything."""
    efficiency: EfficiencyConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("step", self.step, ("sft", "reward", "ppo", "dpo", "pipeline"))
        require(self.samples is None or self.samples >= 1, f"samples must be at least 1 or null, got {self.samples}")
