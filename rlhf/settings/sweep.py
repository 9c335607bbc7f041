"""How the cells of a sweep are run: here, on a SLURM cluster, or as the trials of a search.

Types and ranges only: the values live in conf/sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.settings.ranges import require, require_at_least_one, require_one_of


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Cells on this machine."""

    jobs: int | None
    """Cells at a time. None: as many as the GPUs serve; one at a time on a CPU."""
    gpus: Literal["auto"] | list[int]
    """Which GPUs the cells may have. auto: those of CUDA_VISIBLE_DEVICES, or all of this machine."""
    jobs_per_gpu: int
    """Cells that may share one GPU."""
    strict: bool
    """The command fails (exit code 1) when any cell is not done."""
    resume: bool
    """Goes on with the sweep in run_dir: what is done is not run again."""
    report: bool
    """Makes `rlhf report` of the sweep at its end."""

    def __post_init__(self) -> None:
        require(self.jobs is None or self.jobs >= 1, f"jobs must be at least 1 or null, got {self.jobs}")
        require_at_least_one(jobs_per_gpu=self.jobs_per_gpu)
        if isinstance(self.gpus, list):
            require(len(self.gpus) > 0, "gpus names no GPU: give their numbers, as in [0,1], or auto")
            require(len(set(self.gpus)) == len(self.gpus), f"gpus names a GPU twice: {self.gpus}")


@dataclass(frozen=True, kw_only=True)
class SlurmSweepConfig(SweepConfig):
    """Each cell is a job of a SLURM cluster. `gpus` and `jobs_per_gpu` are the cluster's affair."""

    executor: Literal["slurm", "local"]
    """local: submitit's stand-in for a cluster, which runs jobs on this machine; for trying things out."""
    partition: str | None
    account: str | None
    time_minutes: int
    """Limit of one cell."""
    vanished_minutes: int
    """A job that left no result counts as failed once squeue has not listed it and sacct has had no record of it for so long."""
    setup: list[str]
    """Lines of the batch script before the cell, such as `module load cuda`."""
    parameters: dict[str, Any]
    """Further options of sbatch by their long names: {mem: 64G, qos: high}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("executor", self.executor, ("slurm", "local"))
        asked = [name for name in ("partition", "account", "parameters") if getattr(self, name)]
        require(self.executor == "slurm" or not asked, f"executor=local has no {' or '.join(asked)}: leave that out")
        require_at_least_one(time_minutes=self.time_minutes, vanished_minutes=self.vanished_minutes)


@dataclass(frozen=True, kw_only=True)
class SearchSweepConfig(SweepConfig):
    """Cells are the trials of an Optuna study. The swept words span the space."""

    metric: str
    """A key of `metrics` in summary.json."""
    direction: Literal["maximize", "minimize"]
    trials: int
    """Trials in all, those before a resume included."""
    seeds: list[int]
    """Runs of each trial; its value is their mean. Empty: one run, with the seed of the command line."""
    sampler: Literal["tpe", "random"]
    sampler_seed: int
    pruner: Literal["none", "median"]
    """median: stops a trial that is worse than the median of the finished ones at its step."""
    prune_on: str | None
    """A column of metrics.csv that the pruner watches; of the first seed's run."""
    prune_after: int
    """Steps of metrics.csv before a trial may be stopped."""
    prune_trials: int
    """Finished trials before any may be stopped."""
    storage: str | None
    """Where the study is kept: a database such as sqlite:///study.db. None: a file in the sweep's directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(trials=self.trials)
        require_one_of("direction", self.direction, ("maximize", "minimize"))
        require_one_of("sampler", self.sampler, ("tpe", "random"))
        require_one_of("pruner", self.pruner, ("none", "median"))
        require(len(set(self.seeds)) == len(self.seeds), f"seeds names a seed twice: {self.seeds}")
        for name in ("sampler_seed", "prune_after", "prune_trials"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}")
        require(
            (self.pruner == "none") == (self.prune_on is None),
            "prune_on, a column of metrics.csv, goes with pruner=median, and pruner=median with it",
        )
