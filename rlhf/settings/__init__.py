"""What a configuration may say: the type and the range of every key.

Knows no values (those live in conf/), no torch, no Hydra. Every class is the `_target_` of a config group. A value out of range
raises ValueError that begins with the field's name; `rlhf.config.build` puts the full key before it.
"""

from rlhf.settings.bench import CalibrateBenchConfig, CalibrateSizes, ParityBenchConfig, RolloutBenchConfig, StepBenchConfig
from rlhf.settings.chat import LOOPBACK, ChatConfig, ReplyConfig, ServerConfig
from rlhf.settings.data import ChatFormat, DataConfig
from rlhf.settings.dpo import DPOConfig
from rlhf.settings.plan import EfficiencyConfig, PlanCheckConfig, PlanConfig
from rlhf.settings.ppo import PPOConfig
from rlhf.settings.report import ReportConfig
from rlhf.settings.roles import FrozenConfig, LoraConfig, ModelConfig, OptimizerConfig, RoleConfig, SchedulerConfig, ZeroConfig
from rlhf.settings.run import HardwareConfig, LauncherConfig, TrainerConfig
from rlhf.settings.steps import (
    EvaluationConfig,
    RewardTrainingConfig,
    RolloutConfig,
    SFTConfig,
    StepConfig,
    TensorParallelConfig,
)
from rlhf.settings.sweep import SearchSweepConfig, SlurmSweepConfig, SweepConfig

__all__ = [
    "LOOPBACK",
    "CalibrateBenchConfig",
    "CalibrateSizes",
    "ChatConfig",
    "ChatFormat",
    "DPOConfig",
    "DataConfig",
    "EfficiencyConfig",
    "EvaluationConfig",
    "FrozenConfig",
    "HardwareConfig",
    "LauncherConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ParityBenchConfig",
    "PlanCheckConfig",
    "PlanConfig",
    "ReplyConfig",
    "ReportConfig",
    "RewardTrainingConfig",
    "RoleConfig",
    "RolloutBenchConfig",
    "RolloutConfig",
    "SFTConfig",
    "SchedulerConfig",
    "SearchSweepConfig",
    "ServerConfig",
    "SlurmSweepConfig",
    "StepBenchConfig",
    "StepConfig",
    "SweepConfig",
    "TensorParallelConfig",
    "TrainerConfig",
    "ZeroConfig",
]
