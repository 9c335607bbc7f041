"""One sweep from its cells to an exit code: what is left of them, where they run and how many at a time, the table at the end.

Knows the order of things; words are `words`', cells `run`'s.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rlhf.cli.errors import DONE, FAILED, REFUSED
from rlhf.cli.sweep.page import print_counts, print_table
from rlhf.cli.sweep.report import report_sweep
from rlhf.cli.sweep.run import Cells, Grid, Place
from rlhf.cli.sweep.words import Composer, Words
from rlhf.cli.verbs import VERBS
from rlhf.config import UserError
from rlhf.logging import log
from rlhf.settings import SearchSweepConfig, SlurmSweepConfig, SweepConfig
from rlhf.sweeping.cells import Cell, Sweep, held, joined, read_summary
from rlhf.sweeping.leases import Leases, chosen_gpus, machine_gpus
from rlhf.sweeping.scheduler import Scheduler, Source


class Command:
    """A sweep that has been read.

    Args:
        old: the one it goes on with.
    """

    def __init__(self, composer: Composer, sweep: Sweep, settings: SweepConfig, directory: Path, old: Sweep | None) -> None:
        self.composer, self.sweep, self.settings, self.directory, self.old = composer, sweep, settings, directory, old

    def run(self) -> int:
        """Runs what is left and says how it went; returns the exit code."""
        grid = self.composer.grid()
        cells = self._numbered(grid)
        configs = {cell.folder: self._config(cell, grid) for cell in cells}
        place = self.place([config for config, _ in configs.values()])
        with self.owned():
            self.sweep.cells = cells
            shared = Cells(self.directory, place, resumed=self.old is not None)
            self.sweep.write(self.directory)
            todo = [cell for cell in cells if shared.add(cell, *configs[cell.folder])]
            kept = f", {len(cells) - len(todo)} of them ended" if len(todo) < len(cells) else ""
            log.info("%d cells%s, %d at a time, in %s", len(cells), kept, min(place.slots, len(cells)), self.directory)
            return self.finish(Grid(shared, todo, show=self.sweep.verb == "bench"), place)

    def _config(self, cell: Cell, grid: Sequence[Words]) -> tuple[dict[str, Any], UserError | None]:
        words = next(words for words in grid if words.overrides == cell.overrides)
        return self.composer.config(words.words, self.directory / cell.folder)

    def _numbered(self, grid: Sequence[Words]) -> list[Cell]:
        new = [Cell(str(i), dict(words.overrides)) for i, words in enumerate(grid)]
        for cell in new:
            twin = next(other for other in new if other.overrides == cell.overrides)
            if twin is not cell:
                raise UserError(
                    f"cells {twin.folder} and {cell.folder} are the same ({cell.title().partition(' ')[2]}): name each value once"
                )
        return new if self.old is None else joined(self.old.cells, new)

    def owned(self) -> AbstractContextManager[None]:
        """The directory, for this command alone.

        Raises:
            UserError: it holds something else, or cannot be made.
        """
        # Path.exists raises where a name is too long
        there = {name for name in ("sweep.yaml", "config.yaml", "summary.json") if os.path.exists(self.directory / name)}
        if self.old is None and "sweep.yaml" in there:
            raise UserError(
                f"run_dir={self.directory} already holds a sweep: choose another run_dir, or sweep.resume=true to go on with it"
            )
        if there - {"sweep.yaml"}:
            raise UserError(f"run_dir={self.directory} already holds a run: choose another run_dir for a sweep")
        return held(self.directory)

    def place(self, configs: Sequence[dict[str, Any]]) -> Place:
        """Where the cells of these configs run, and how many at a time."""
        settings, bench = self.settings, self.sweep.verb == "bench"
        if bench and settings.jobs not in (None, 1):
            raise UserError(f"sweep.jobs={settings.jobs}: benchmarks would disturb each other: leave it at 1")
        if isinstance(settings, SlurmSweepConfig):
            from rlhf.cli.sweep.slurm import cluster

            if settings.gpus != "auto" or settings.jobs_per_gpu != 1:
                raise UserError(
                    "sweep.gpus and sweep.jobs_per_gpu are for GPUs of this machine: with sweep=slurm the cluster gives them out"
                )
            return cluster(self.directory, settings)
        wants_gpus = any(config["trainer"]["accelerator"] != "cpu" for config in configs)
        there = machine_gpus() if wants_gpus else {}
        gpus = {number: there[number] for number in chosen_gpus(settings.gpus, list(there))} if wants_gpus else {}
        if not wants_gpus and settings.gpus != "auto":
            raise UserError(f"sweep.gpus={settings.gpus}, but trainer.accelerator=cpu: choose trainer=gpu, or leave it out")
        slots = settings.jobs or (1 if bench else max(1, len(gpus) * settings.jobs_per_gpu))
        return Place(gpus, slots)

    def finish(self, source: Source, place: Place) -> int:
        """Runs a source to its end; then the table."""
        sys.stdout.flush()
        leases = Leases(list(place.gpus), self.settings.jobs_per_gpu)
        whole = Scheduler(source, slots=place.slots, leases=leases).run()
        wanted = self.settings.metric if isinstance(self.settings, SearchSweepConfig) else None
        print_table(self.directory, self.sweep.cells, wanted)
        print_counts(self.directory, self.sweep.cells)
        if self.settings.report and self.sweep.verb != "bench":
            report_sweep(self.directory, self.sweep.cells, wanted)
        if not whole:
            where = [] if self.sweep.verb in VERBS else ["--config-dir", str(self.sweep.config_dir)]
            words = shlex.join([self.sweep.verb, *where, "-m", f"run_dir={self.directory}", "sweep.resume=true"])
            log.info("stopped by Ctrl-C; go on with: rlhf %s", words)
            return FAILED
        return self.exit_code()

    def exit_code(self) -> int:
        statuses = [(read_summary(self.directory / cell.folder) or {"status": "not run"})["status"] for cell in self.sweep.cells]
        if statuses and all(status == "refused" for status in statuses):
            return REFUSED
        if "done" not in statuses or (self.settings.strict and any(status in ("failed", "refused") for status in statuses)):
            return FAILED
        return DONE
