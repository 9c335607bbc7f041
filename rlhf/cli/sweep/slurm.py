"""Cells on a SLURM cluster: what each asks for, and what its tasks run. Knows configs; the cluster is `rlhf.sweeping.slurm`'s."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf.cli import rundir
from rlhf.cli.sweep import run as here
from rlhf.cli.sweep.run import Place
from rlhf.settings import SlurmSweepConfig
from rlhf.sweeping.cells import Cell, read_summary, write_summary
from rlhf.sweeping.scheduler import Handle
from rlhf.sweeping.slurm import Work, executor, still_there, submit, watch

QUEUE = 1000
"""Cells that wait in the cluster's queue at a time, where sweep.jobs does not say: the cluster has limits of its own."""


class Cluster:
    """Args:
    directory: of the sweep; scripts and pickles go to `slurm/N` below it.
    """

    def __init__(self, directory: Path, settings: SlurmSweepConfig) -> None:
        self.directory, self.settings, self.watch = directory, settings, watch(settings)

    def folder(self, cell: Cell) -> Path:
        return self.directory / "slurm" / cell.folder

    def submit(self, cell: Cell, config: dict[str, Any], folder: Path) -> Handle:
        """One node: a task that starts its ranks. Several: a task for each rank, which read the config that is claimed here."""
        trainer = config["trainer"]
        nodes = trainer["num_nodes"]
        cluster = executor(
            self.folder(cell), self.settings, name=f"{self.directory.name}-{cell.folder}", nodes=nodes, devices=trainer["devices"],
            gpus=trainer["accelerator"] != "cpu",
        )  # fmt: skip
        command, stdin = here.CELL, yaml.safe_dump(config)
        if nodes > 1:
            rundir.claim(folder, config)
            command, stdin = (*command[:2], "rlhf.cli.rank", str(folder / "config.yaml")), ""
        work = Work(command, stdin, str(folder / "log.txt"), ranks=nodes > 1)
        return submit(cluster, work, self.settings.executor, self.watch, lambda what: record_lost(folder, config, what))

    def attach(self, cell: Cell, folder: Path) -> Handle | None:
        """The job of an earlier command, which the cluster goes on with whether or not somebody watches."""
        if self.settings.executor != "slurm":
            return None
        saved = rundir.saved_config(folder)
        return still_there(self.folder(cell), folder / "log.txt", self.watch, lambda what: record_lost(folder, saved, what))


def record_lost(folder: Path, config: Mapping[str, Any] | None, what: str) -> None:
    """The summary of a cell whose job has vanished, so that the table, too, says what was looked at. One that the job has written stands."""
    if config is not None and read_summary(folder) is None:
        summary = {
            "verb": config["verb"], "status": "failed", "seed": config["seed"], "commit": rundir.commit(), "hardware": {}, "config": dict(config),
            "metrics": {}, "seconds": {}, "error": f"RuntimeError: {what}",
        }  # fmt: skip
        write_summary(folder, summary)


def cluster(directory: Path, settings: SlurmSweepConfig) -> Place:
    """
    Raises:
        UserError: there is no cluster to be found.
    """
    executor(directory / "slurm", settings, name="", nodes=1, devices=1, gpus=False)
    return Place({}, settings.jobs or QUEUE, Cluster(directory.absolute(), settings))
