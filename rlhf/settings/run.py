"""Where and how a job runs.

Types and ranges only: the values live in conf/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.settings.ranges import require, require_at_least_one, require_in


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    accelerator: Literal["auto", "cpu", "cuda"]
    devices: int
    """Ranks on one node."""
    num_nodes: int
    precision: Literal["fp32", "bf16", "fp16"]
    log_every: int
    """Steps between two lines of metrics.csv."""
    checkpoint_every: int | None
    """Steps between two checkpoints. None: only when Ctrl-C asks for one."""
    keep_checkpoints: int
    eval_every: int | None
    """Steps between two evaluations on held-out rows. None: before and after only."""
    eval_batches: int
    """Batches of one such evaluation at most."""
    align_overflow: bool
    """fp16: if one role's gradients overflow, every role of the step is skipped."""
    threads: int | None
    """CPU threads a rank. None: torch's choice."""

    def __post_init__(self) -> None:
        require(self.accelerator in ("auto", "cpu", "cuda"), f"accelerator must be auto, cpu or cuda, got {self.accelerator}")
        require(self.precision in ("fp32", "bf16", "fp16"), f"precision must be fp32, bf16 or fp16, got {self.precision}")
        require_at_least_one(
            devices=self.devices, num_nodes=self.num_nodes, log_every=self.log_every, keep_checkpoints=self.keep_checkpoints
        )
        require(self.threads is None or self.threads <= 4096, f"threads must be at most 4096, got {self.threads}")
        for name in ("checkpoint_every", "eval_every", "threads"):
            require(
                getattr(self, name) is None or getattr(self, name) >= 1, f"{name} must be at least 1 or null, got {getattr(self, name)}"
            )


@dataclass(frozen=True, kw_only=True)
class LauncherConfig:
    """Who starts the ranks of one job (Hydra's own launcher starts jobs)."""

    name: Literal["local", "external", "slurm", "hostfile"]
    """local: this command starts them. external: torchrun, srun or the deepspeed launcher already did.
    slurm and hostfile: writes what starts them on several nodes, and prints how."""
    master_addr: str
    master_port: int | None
    """None: a free port."""
    timeout_minutes: float
    """Limit of one collective."""
    hostfile: str | None
    slurm: dict[str, Any]
    """`#SBATCH` options for name=slurm."""

    def __post_init__(self) -> None:
        require(
            self.name in ("local", "external", "slurm", "hostfile"), f"name must be local, external, slurm or hostfile, got {self.name}"
        )
        require(self.timeout_minutes > 0, f"timeout_minutes must be positive, got {self.timeout_minutes}")
        require(self.name != "hostfile" or self.hostfile is not None, "hostfile names no file")


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """One kind of accelerator, from its data sheet or from a measurement."""

    name: str
    memory_gb: float
    """Memory of one device that a program can have, 10^9 bytes."""
    bandwidth_gbs: float
    """Device memory bandwidth, 10^9 bytes/s."""
    tflops_16bit: float
    """Dense 16-bit matrix rate, 10^12 operations/s; 0: unknown."""
    devices_per_node: int
    link_gbs: float
    """Between two devices of one node, one direction, 10^9 bytes/s."""
    network_gbs: float
    """Of one node, one direction, 10^9 bytes/s."""
    host_memory_gb: float
    """Main memory of one node, 10^9 bytes; 0: unknown."""
    host_link_gbs: float
    """Between one device and its host, one direction, 10^9 bytes/s; 0: none."""
    price_per_hour: float
    """US dollars for one device and hour; 0: unknown."""

    def __post_init__(self) -> None:
        require_at_least_one(devices_per_node=self.devices_per_node)
        for name in (
            "memory_gb", "bandwidth_gbs", "tflops_16bit", "link_gbs", "network_gbs", "host_memory_gb", "host_link_gbs", "price_per_hour",
        ):  # fmt: skip
            require_in(name, getattr(self, name), 0)
