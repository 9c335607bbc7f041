"""The DeepSpeed configuration of one role.

Knows DeepSpeed's keys; knows no model. Keys that are not set keep DeepSpeed's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.settings import LoraConfig, OptimizerConfig, SchedulerConfig, ZeroConfig


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a role learns."""

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    total_steps: int
    """Optimizer steps of the whole run: what the learning-rate schedule spans."""
    lora: LoraConfig
    micro_batch_size: int
    accumulation: int
    """Micro-batches of one optimizer step."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One role's engine. `training` is None for a role that only answers."""

    zero: ZeroConfig
    precision: str
    training: Training | None
    reloadable: bool
    """The frozen weights can be read again from where they came, so checkpoints leave them out."""

    @property
    def stage(self) -> int:
        """The ZeRO stage that runs: bf16 training at stage 0 runs at stage 1.

        DeepSpeed's stage-0 bf16 optimizer drifts from the other stages; stage 1 keeps the same memory on one rank and less on many.
        """
        if self.training is not None and self.precision == "bf16":
            return max(1, self.zero.stage)
        return self.zero.stage


def engine_config(spec: EngineSpec) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`. Gradients are averaged over ranks; clipping acts on a role's whole gradient."""
    zero: dict[str, Any] = {
        "stage": spec.stage,
        "overlap_comm": spec.zero.overlap_comm,
        "reduce_bucket_size": spec.zero.reduce_bucket_size,
    }
    if spec.stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": spec.zero.persistence_threshold,
            "stage3_max_live_parameters": spec.zero.max_live_parameters,
            "stage3_prefetch_bucket_size": spec.zero.prefetch_bucket_size,
            "memory_efficient_linear": False,
        }
        if spec.zero.quantized_weights:
            zero |= {"zero_quantized_nontrainable_weights": True, "zero_hpz_partition_size": spec.zero.hpz_partition_size}
    if spec.zero.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if spec.zero.offload_optimizer and spec.training is not None:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    training = spec.training
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size if training else 1,
        "gradient_accumulation_steps": training.accumulation if training else 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": training.optimizer.grad_clip if training else 0.0,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if spec.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if spec.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale_window": 100, "initial_scale_power": 16}  # window: the original's
    return config
