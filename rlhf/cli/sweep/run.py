"""The cells of a sweep in their directory: judged, started, recorded; and a grid as the source of them.

Knows configs of jobs and how a cell's process is called; who runs when is `rlhf.sweeping.scheduler`'s.
"""

from __future__ import annotations

import copy
import os
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import yaml

from rlhf.cli import rundir
from rlhf.cli.plan import require_fit
from rlhf.cli.sweep.page import say_end, say_start
from rlhf.cli.sweep.report import tell_stopped
from rlhf.cli.vocabulary import require_one_vocabulary
from rlhf.config import UserError, build
from rlhf.engines.launcher import CORES
from rlhf.logging import log
from rlhf.rules import check
from rlhf.sweeping.cells import INTERRUPTED, Cell, clear, fate, read_summary, write_summary
from rlhf.sweeping.leases import lent
from rlhf.sweeping.processes import Ended, LocalJob
from rlhf.sweeping.scheduler import Handle, Task

CELL: tuple[str, ...] = (sys.executable, "-m", "rlhf.cli.sweep.cell")
Config = dict[str, Any]


class Cluster(Protocol):
    """Other machines that run cells."""

    def submit(self, cell: Cell, config: Config, folder: Path) -> Handle: ...

    def attach(self, cell: Cell, folder: Path) -> Handle | None: ...


@dataclass
class Place:
    """Where cells run: the GPUs of this machine, or a cluster."""

    gpus: dict[str, str]
    """Names by number; empty: CPU."""
    slots: int
    """Cells at a time."""
    cluster: Cluster | None = None
    """Which has GPUs of its own."""

    def needs(self, cfg: Any) -> int:
        """GPUs of a job that runs here."""
        trainer = cfg.trainer
        wants = trainer.accelerator == "cuda" or (trainer.accelerator == "auto" and bool(self.gpus))
        return trainer.devices if wants and self.cluster is None else 0


class Cells:
    """What every kind of sweep does with a cell.

    Args:
        directory: of the sweep.
        resumed: cells that are there already are looked at, and gone on with.
        wanted: the metric that the sweep is about.
    """

    def __init__(self, directory: Path, place: Place, *, resumed: bool, wanted: str | None = None) -> None:
        self.directory, self.place, self.resumed, self.wanted = directory, place, resumed, wanted
        self.commit = rundir.commit()
        self.configs: dict[str, Config] = {}
        self.needs: dict[str, int] = {}

    def folder(self, cell: Cell) -> Path:
        return self.directory / cell.folder

    # --- before a cell starts --------------------------------------------------------------------------------------------------

    def add(self, cell: Cell, config: Config, error: UserError | None = None) -> bool:
        """Whether the cell is to be run: not if it has ended, and not if its settings are refused, which is recorded.

        Args:
            error: why the config could not be resolved.

        Raises:
            UserError: the cell had begun with other settings.
        """
        folder = self.folder(cell)
        if self.resumed:
            saved = rundir.saved_config(folder)
            change = rundir.first_change(saved, config) if saved is not None else None
            if change is not None:
                raise UserError(f"sweep.resume=true cannot change {change} of cell {cell.title()}: start a new run_dir for other settings")
            if fate(folder, steps=config["verb"] == "pipeline") == "keep":
                return False
        if self.place.cluster is not None and config["trainer"]["num_nodes"] > 1 and config["verb"] != "pipeline":
            config = {**config, "launcher": {**config["launcher"], "name": "external"}}  # its tasks are the ranks
        try:
            if error is not None:
                raise error
            self.needs[cell.folder] = self._judge(config)
        except UserError as refusal:
            write_summary(folder, self.summary(config, "refused", f"UserError: {refusal}"))
            say_end(cell, read_summary(folder) or {})
            return False
        self.configs[cell.folder] = config
        return True

    def _judge(self, config: Config) -> int:
        """GPUs that a cell needs here.

        Raises:
            UserError: as the job itself would, or as a sweep cannot run it.
        """
        cfg = build(config)
        several = cfg.trainer.num_nodes > 1
        if several and (self.place.cluster is None or cfg.verb == "pipeline"):
            what = "rlhf pipeline starts its steps on one node: sweep its verbs" if cfg.verb == "pipeline" else "choose sweep=slurm"
            raise UserError(f"trainer.num_nodes={cfg.trainer.num_nodes} is more than this sweep has: {what}")
        if cfg.launcher.name != ("external" if several else "local"):
            raise UserError(f"launcher={cfg.launcher.name} is for a single run: a sweep starts its cells itself; on a cluster: sweep=slurm")
        if cfg.resume:
            raise UserError("resume=true goes on with a single run: a sweep goes on with sweep.resume=true")
        if cfg.launcher.master_port is not None and self.place.slots > 1:
            raise UserError(f"launcher.master_port={cfg.launcher.master_port} would be that of all cells that run together: leave it null")
        check(cfg)
        require_one_vocabulary(cfg)
        needs = self.place.needs(cfg)
        if needs > len(self.place.gpus):
            raise UserError(f"trainer.devices={needs} on GPUs, but the sweep has {len(self.place.gpus)}")
        if needs:
            require_fit(cfg, "cuda")
        return needs

    # --- a cell that runs ------------------------------------------------------------------------------------------------------

    def task(self, cell: Cell) -> Task:
        return Task(name=cell.folder, gpus=self.needs[cell.folder], start=lambda gpus: self._start(cell, gpus))

    def _start(self, cell: Cell, gpus: list[str]) -> Handle:
        folder, config, cluster = self.folder(cell), self.configs[cell.folder], self.place.cluster
        if self.resumed and cluster is not None and (job := cluster.attach(cell, folder)) is not None:
            log.info("%s runs still", cell.title())
            return job
        state = fate(folder, steps=config["verb"] == "pipeline") if self.resumed else "anew"
        if state == "keep":  # a job of a cluster that has ended since we looked
            return Ended()
        if state == "go on":
            (folder / "summary.json").unlink(missing_ok=True)
            config = {**(rundir.saved_config(folder) or config), "resume": True, "run_dir": str(folder)}
        else:
            clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        say_start(cell, gpus, goes_on=state == "go on")
        if cluster is not None:
            return cluster.submit(cell, config, folder)
        return LocalJob(CELL, stdin=yaml.safe_dump(config), log=folder / "log.txt", environment=self._environment(config, gpus))

    def _environment(self, config: Config, gpus: list[str]) -> dict[str, str]:
        """The cell's GPUs, and its share of the cores: torch would give each cell all of them."""
        cores = max(1, len(os.sched_getaffinity(0)) // self.place.slots)
        environment = {CORES: str(cores)}
        if config["trainer"]["threads"] is None and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(cores)
        return environment | (lent(gpus) if gpus else {})

    # --- a cell that has ended -------------------------------------------------------------------------------------------------

    def end(self, cell: Cell, code: int, *, stopped: str | None = None, interrupted: bool = False) -> Config:
        """Records what the job could not say itself, says how the cell ended, and returns its summary."""
        folder, config = self.folder(cell), self.configs[cell.folder]
        summary = read_summary(folder)
        error = str((summary or {}).get("error", ""))
        if stopped is not None:
            summary = self.summary(config, "pruned", stopped)
        elif interrupted and (summary is None or (summary["status"] == "failed" and not error.startswith(INTERRUPTED))):
            summary = self.summary(config, "failed", f"{INTERRUPTED}stopped by Ctrl-C; sweep.resume=true goes on")
        elif summary is None:
            summary = self.summary(config, "failed", f"RuntimeError: {how_it_ended(code)} without a summary: see log.txt")
        write_summary(folder, summary)
        if stopped is not None or code < 0:
            tell_stopped(folder, summary["status"], summary.get("error", ""))
        say_end(cell, summary, self.wanted)
        return summary

    def summary(self, config: Config, status: str, error: str) -> Config:
        """The summary of a job that did not run, or could not write its own. It has no torch to ask."""
        hardware = {"gpus": list(self.place.gpus.values()), "cpu": platform.processor() or platform.machine(), "torch": version("torch"),
                    "threads": None}  # fmt: skip
        return {
            "verb": config["verb"], "status": status, "seed": config["seed"], "commit": self.commit, "hardware": hardware,
            "config": copy.deepcopy(config), "metrics": {}, "seconds": {}, "error": error,
        }  # fmt: skip


def how_it_ended(code: int) -> str:
    return f"the process was ended by {signal.Signals(-code).name}" if code < 0 else f"the process ended with exit code {code}"


class Grid:
    """Cells known in advance, in order: a source of tasks.

    Args:
        show: prints the log of each cell when it ends, for verbs whose result is what they print.
    """

    def __init__(self, cells: Cells, todo: Sequence[Cell], *, show: bool = False) -> None:
        self.cells, self.todo, self.show = cells, list(todo), show
        self.by_name = {cell.folder: cell for cell in todo}

    def next(self) -> Task | None:
        return self.cells.task(self.todo.pop(0)) if self.todo else None

    def watch(self, task: Task) -> str | None:
        return None

    def ended(self, task: Task, code: int, *, stopped: str | None, interrupted: bool) -> None:
        cell = self.by_name[task.name]
        self.cells.end(cell, code, stopped=stopped, interrupted=interrupted)
        if self.show:
            print((self.cells.folder(cell) / "log.txt").read_text(encoding="utf-8", errors="replace"), end="", flush=True)
