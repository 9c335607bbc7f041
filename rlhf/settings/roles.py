"""One role (actor, critic, ref, reward): its network, its sharding, its optimizer.

Types and ranges only: the values live in conf/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.settings.ranges import require, require_at_least_one, require_in

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Keys that every shape has."""
MORE_SIZES = (
    "num_key_value_heads", "intermediate_size", "ffn_dim", "n_inner", "word_embed_proj_dim", "max_position_embeddings", "head_dim", "rotary_dim",
    "window_size",
)  # fmt: skip
"""Keys that some families have; null leaves one to the family."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network and where its weights come from."""

    name: str
    path: str | None
    """Hub id or local folder. None: only the shape below, so `pretrained` must be false."""
    pretrained: bool
    """False: random weights from `shape`."""
    family: str
    """`model_type` of transformers: opt, llama, gpt2, ..."""
    shape: dict[str, Any]
    """Keywords of the transformers config (its canonical names). Planning reads it, `pretrained=false` builds from it."""
    parameters: int
    """Parameters of the causal LM, a tied head counted once."""
    tokenizer: str | None
    """Hub id, local folder, or `train:<kind>:<vocab size>` (kind word or bpe). None: the tokenizer at `path`."""

    def __post_init__(self) -> None:
        require(self.path is not None or not self.pretrained, f"pretrained=true needs a path ({self.name} has none)")
        for key in SIZES:
            require(key in self.shape, f"shape.{key} is missing")
        for key in (*SIZES, *(key for key in MORE_SIZES if self.shape.get(key) is not None)):
            size = self.shape[key]
            require(isinstance(size, int) and not isinstance(size, bool), f"shape.{key} must be a whole number, got {size!r}")
            require(size >= 1, f"shape.{key} must be at least 1, got {size}")


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """How one role's engine is sharded (DeepSpeed ZeRO)."""

    stage: Literal[0, 1, 2, 3]
    offload_optimizer: bool
    offload_params: bool
    """Parameters in host memory; needs stage 3."""
    quantized_weights: bool
    """Mixed-precision ZeRO++ (MixZ++): frozen weights quantised; needs stage 3 and LoRA."""
    hpz_partition_size: int
    """ZeRO++ secondary partition: ranks of one node that hold a full copy. 1: off."""
    gather_layers: bool
    """Stage 3: the parameters of a layer are made whole together. False: those of each module for itself, which needs a little less memory
    and several times as much of DeepSpeed's Python."""
    persistence_threshold: int
    """Stage 3: parameters with fewer elements are never sharded."""
    max_live_parameters: int
    prefetch_bucket_size: int
    reduce_bucket_size: int
    overlap_comm: bool

    def __post_init__(self) -> None:
        require(self.stage in (0, 1, 2, 3), f"stage must be 0, 1, 2 or 3, got {self.stage}")
        require(not self.offload_params or self.stage == 3, f"offload_params needs stage=3, got stage={self.stage}")
        require(not self.offload_optimizer or self.stage >= 1, "offload_optimizer needs stage 1, 2 or 3, got stage=0")
        require(not self.quantized_weights or self.stage == 3, f"quantized_weights needs stage=3, got stage={self.stage}")
        require(
            self.hpz_partition_size == 1 or self.quantized_weights, "hpz_partition_size acts with quantized_weights=true only: set it to 1"
        )
        require_at_least_one(hpz_partition_size=self.hpz_partition_size, reduce_bucket_size=self.reduce_bucket_size)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters through PEFT. rank 0 turns them off."""

    rank: int
    alpha: float
    dropout: float
    target_modules: str | list[str]
    """`all-linear`, or names PEFT matches against the ends of module names."""
    only: bool
    """True: everything but the adapters (and a scalar head) is frozen."""
    lr: float | None
    """Learning rate of the adapters. None: that of the optimizer."""

    def __post_init__(self) -> None:
        require_in("rank", self.rank, 0)
        require_in("dropout", self.dropout, 0, 1)
        require_in("lr", self.lr or 0, 0, 1e30)
        require(self.rank == 0 or self.alpha > 0, f"alpha must be positive, got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "fused_adam", "cpu_adam"]
    """adamw is torch's and runs anywhere; fused_adam and cpu_adam are DeepSpeed's."""
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    grad_clip: float
    """Largest gradient norm of the role; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require(self.name in ("adamw", "fused_adam", "cpu_adam"), f"name must be adamw, fused_adam or cpu_adam, got {self.name}")
        require_in("grad_clip", self.grad_clip, 0)
        for name in ("lr", "weight_decay"):  # Adam divides a rate by what begins near zero, which must stay a number
            require_in(name, getattr(self, name), 0, 1e30)
        require(self.eps > 0, f"eps must be positive, got {self.eps}")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), f"betas must be two numbers in [0, 1), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    name: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
    warmup: float
    """Below 1: a share of all steps; from 1 on: steps."""
    min_lr_ratio: float
    """The learning rate ends at this share of its peak (linear and cosine only)."""

    def __post_init__(self) -> None:
        names = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
        require(self.name in names, f"name must be one of {', '.join(names)}, got {self.name}")
        require_in("warmup", self.warmup, 0)
        require_in("min_lr_ratio", self.min_lr_ratio, 0, 1)
        decays = ("linear", "cosine", "cosine_with_restarts")
        require(self.min_lr_ratio == 0 or self.name in decays, f"min_lr_ratio works with {', '.join(decays)}, not {self.name}")


@dataclass(frozen=True, kw_only=True)
class RoleConfig:
    """One network of the recipe: actor, critic, ref or reward."""

    model: ModelConfig
    zero: ZeroConfig
    lora: LoraConfig
    init: str | None
    """Export folder or run directory to start from; None: `model.path`, or random weights."""
    dropout: float | None
    """Overrides every dropout of the model's config. None: the model's own."""
    gradient_checkpointing: bool

    def __post_init__(self) -> None:
        require(self.dropout is None or 0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")
        require(self.lora.rank > 0 or not self.zero.quantized_weights, "zero.quantized_weights needs LoRA: choose lora=r128")


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """A role that only answers: its model comes from the role it copies."""

    zero: ZeroConfig
    init: str | None
    shared: bool
    """The actor answers for it with its adapters off, so that no second copy of its weights is held. Needs adapters that alone learn
    (`actor.lora.only`)."""

    def __post_init__(self) -> None:
        require(
            not self.shared or self.zero.stage == 0,
            f"shared=true has no weights that zero.stage={self.zero.stage} could shard: choose zero@ref.zero=z0",
        )
        require(self.zero.stage in (0, 3), f"zero.stage of a frozen role must be 0 or 3, got {self.zero.stage}")
