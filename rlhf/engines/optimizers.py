"""Optimizer and learning-rate schedule of one role.

Know parameters and steps; know no loss and no trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rlhf.engines.config import Training
from rlhf.settings import SchedulerConfig

NO_DECAY = ("bias", "norm", "ln_")
"""Parts of the names of parameters that weight decay leaves alone (with every parameter of one dimension)."""


def parameter_groups(network: nn.Module, training: Training) -> list[dict[str, Any]]:
    """Trainable parameters in up to three groups: decayed, not decayed, and adapters with their own learning rate.

    Empty groups are left out, so that a scheduler's groups line up with the optimizer's.
    """
    decay, plain, adapters = [], [], []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_" in name:
            adapters.append(parameter)
        elif len(getattr(parameter, "ds_shape", parameter.shape)) < 2 or any(part in name.lower() for part in NO_DECAY):
            plain.append(parameter)
        else:
            decay.append(parameter)
    optimizer = training.optimizer
    lora_lr = optimizer.lr if training.lora.lr is None else training.lora.lr
    groups = [
        {"params": decay, "lr": optimizer.lr, "weight_decay": optimizer.weight_decay, "name": "decay"},
        {"params": plain, "lr": optimizer.lr, "weight_decay": 0.0, "name": "no_decay"},
        {"params": adapters, "lr": lora_lr, "weight_decay": optimizer.weight_decay, "name": "lora"},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(network: nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW in one of three implementations; all decouple the weight decay."""
    groups, settings = parameter_groups(network, training), training.optimizer
    keywords: dict[str, Any] = {
        "lr": settings.lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "fused_adam":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **keywords)
    if settings.name == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **keywords)
    return torch.optim.AdamW(groups, **keywords)


def learning_rate_factor(scheduler: SchedulerConfig, total_steps: int) -> Callable[[int], float]:
    """Step -> factor on the peak learning rate. The curves of transformers' `get_scheduler` of the same name, and
    a warmup for `constant` too where one is asked for."""
    warmup = int(scheduler.warmup if scheduler.warmup >= 1 else scheduler.warmup * total_steps)
    low = scheduler.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        match scheduler.name:
            case "linear":
                return low + (1 - low) * (1 - progress)
            case "cosine" | "cosine_with_restarts":  # transformers' default is one cycle, which makes the two the same
                return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
            case "polynomial":  # power 1 down to lr 1e-7, transformers' defaults; the floor is below any use
                return 1 - progress
            case _:
                return 1.0

    return factor


def build_scheduler(optimizer: torch.optim.Optimizer, training: Training) -> LambdaLR:
    return LambdaLR(optimizer, learning_rate_factor(training.scheduler, training.total_steps))
