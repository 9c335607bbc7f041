"""`rlhf VERB -m ...`: from a command line to cells, to their end, to an exit code.

Knows the order of things; words are `sweep_words`', cells `sweep_run`'s, trials `sweep_search`'s. Exit codes: 0 the sweep ran to its end
(cells that failed are named), 1 no cell is done, or Ctrl-C, or with sweep.strict=true any cell failed or was refused, 2 refused.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlhf.cli import rundir
from rlhf.cli.errors import DONE, FAILED, REFUSED
from rlhf.cli.hydra_app import explain, primary_config
from rlhf.cli.main import VERBS
from rlhf.cli.sweep_page import print_counts, print_table
from rlhf.cli.sweep_report import report_sweep
from rlhf.cli.sweep_run import Cells, Grid, Place
from rlhf.cli.sweep_words import Composer, Line, Words, is_sweep_word, key_of, read_line
from rlhf.config import UserError, build
from rlhf.logging import log
from rlhf.settings import SearchSweepConfig, SlurmSweepConfig, SweepConfig
from rlhf.sweeping.cells import Cell, Sweep, first_difference, held, joined, read_summary, read_sweep
from rlhf.sweeping.leases import Leases, chosen_gpus, machine_gpus
from rlhf.sweeping.scheduler import Scheduler, Source

PRINTS = ("plan", "report")
"""Verbs that start no job and leave no run: they answer in this process, one after the other."""
JOBS = ("pipeline", "sft", "reward", "ppo", "dpo", "evaluate", "bench")
"""Verbs whose runs are cells, as are those of a verb of the user's."""
MAY_CHANGE = (
    "jobs",
    "gpus",
    "jobs_per_gpu",
    "strict",
    "resume",
    "report",
    "trials",
    "partition",
    "account",
    "time_minutes",
    "setup",
    "parameters",
)
"""Keys of the sweep section that a resumed sweep may change."""


def run_sweep(verb: str, words: Sequence[str]) -> int:
    """Runs a sweep and returns the exit code.

    Raises:
        UserError: the sweep as a whole is refused.
    """
    line = read_line(verb, words)
    try:
        if verb in PRINTS:
            return _print_each(line)
        if verb in VERBS and verb not in JOBS:
            raise UserError(f"rlhf {verb} runs no job that would end, so that there is nothing to sweep: leave -m out")
        old = _earlier(line)
        if old is not None:
            line = _with_earlier_words(line, old)
        composer = Composer(line)
        node = composer.settings(line.sweep)
        settings: SweepConfig = build(node, "sweep")
        directory = Path(line.run_dir) if line.run_dir is not None else composer.default_directory()
        sweep = Sweep(verb, line.words, line.config_name, line.config_dir, rundir.commit(), node)
        if old is not None:
            _check_same(composer, sweep, old)
        return Command(composer, sweep, settings, directory, old).run()
    except (HydraException, OmegaConfBaseException) as error:
        folder = None if line.config_dir is None else Path(line.config_dir)
        raise UserError(explain(error, primary_config(verb, list(line.task)), folder)) from error
    finally:
        GlobalHydra.instance().clear()


# --- going on ------------------------------------------------------------------------------------------------------------------


def _earlier(line: Line) -> Sweep | None:
    """The sweep that the line goes on with.

    Raises:
        UserError: there is none in run_dir, or one is in the way.
    """
    resume = yaml.safe_load(next((word.partition("=")[2] for word in line.sweep if key_of(word) == "sweep.resume"), "false"))
    if resume is not True:
        return None
    if line.run_dir is None:
        raise UserError("sweep.resume=true needs run_dir=DIR, the directory of the sweep to go on with")
    old = read_sweep(Path(line.run_dir))
    if old.verb != line.verb:
        raise UserError(f"run_dir={line.run_dir} holds a sweep of rlhf {old.verb}, not of rlhf {line.verb}")
    return old


def _with_earlier_words(line: Line, old: Sweep) -> Line:
    """A line that names no jobs goes on with the words of sweep.yaml, and what it says of the sweep section on top."""
    if line.task or line.config_name is not None:
        return line
    task = tuple(word for word in old.words if not is_sweep_word(word))
    sweep = {key_of(word): word for word in (*(word for word in old.words if is_sweep_word(word)), *line.sweep)}
    return dataclasses.replace(line, task=task, config_name=old.config_name, config_dir=old.config_dir, sweep=tuple(sweep.values()))


def _check_same(composer: Composer, sweep: Sweep, old: Sweep) -> None:
    """
    Raises:
        UserError: names the first thing that is not as the sweep began.
    """
    if sweep.config_name != old.config_name:
        raise UserError(f"sweep.resume=true: -cn is {sweep.config_name}, but the sweep began with {old.config_name}")
    searches = "metric" in sweep.settings
    words = [word for word in sweep.words if not is_sweep_word(word)]
    before = [word for word in old.words if not is_sweep_word(word)]
    if not searches:  # a grid may be given more values: `joined` compares those
        swept = {override.get_key_element() for override in (*composer.swept, *composer.swept_in(before))}
        words, before = ([word for word in some if word.partition("=")[0] not in swept] for some in (words, before))
    difference = first_difference(before, words)
    if difference is not None:
        raise UserError(f"sweep.resume=true: {difference}; leave the words out, or start a new run_dir")
    for key in dict.fromkeys([*old.settings, *sweep.settings]):
        was, now = old.settings.get(key), sweep.settings.get(key)
        if key not in MAY_CHANGE and was != now and (searches or "metric" in old.settings):
            raise UserError(f"sweep.resume=true cannot change sweep.{key} (was {was!r}, now {now!r}): start a new run_dir")


# --- one sweep -----------------------------------------------------------------------------------------------------------------


class Command:
    """A sweep that has been read.

    Args:
        old: the one it goes on with.
    """

    def __init__(self, composer: Composer, sweep: Sweep, settings: SweepConfig, directory: Path, old: Sweep | None) -> None:
        self.composer, self.sweep, self.settings, self.directory, self.old = composer, sweep, settings, directory, old

    def run(self) -> int:
        """Runs what is left and says how it went; returns the exit code."""
        if isinstance(self.settings, SearchSweepConfig):
            from rlhf.cli.sweep_search import start_search

            return start_search(self)
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
            UserError: it holds something else.
        """
        if self.old is None and (self.directory / "sweep.yaml").exists():
            raise UserError(
                f"run_dir={self.directory} already holds a sweep: choose another run_dir, or sweep.resume=true to go on with it"
            )
        if any((self.directory / name).exists() for name in ("config.yaml", "summary.json")):
            raise UserError(f"run_dir={self.directory} already holds a run: choose another run_dir for a sweep")
        return held(self.directory)

    def place(self, configs: Sequence[dict[str, Any]]) -> Place:
        """Where the cells of these configs run, and how many at a time."""
        settings, bench = self.settings, self.sweep.verb == "bench"
        if bench and settings.jobs not in (None, 1):
            raise UserError(f"sweep.jobs={settings.jobs}: benchmarks would disturb each other: leave it at 1")
        if isinstance(settings, SlurmSweepConfig):
            from rlhf.cli.sweep_slurm import cluster

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
            where = "" if self.sweep.verb in VERBS else f" --config-dir {self.sweep.config_dir}"
            log.info("stopped by Ctrl-C; go on with: rlhf %s%s -m run_dir=%s sweep.resume=true", self.sweep.verb, where, self.directory)
            return FAILED
        return self.exit_code()

    def exit_code(self) -> int:
        statuses = [(read_summary(self.directory / cell.folder) or {"status": "not run"})["status"] for cell in self.sweep.cells]
        if statuses and all(status == "refused" for status in statuses):
            return REFUSED
        if "done" not in statuses or (self.settings.strict and any(status in ("failed", "refused") for status in statuses)):
            return FAILED
        return DONE


# --- verbs that print ----------------------------------------------------------------------------------------------------------


def _print_each(line: Line) -> int:
    """The answers of plan or report, cell by cell; a refused one leaves the others alone."""
    from rlhf.cli.plan import run_plan
    from rlhf.cli.report import run_report

    if line.sweep:
        raise UserError(f"{line.sweep[0]}: rlhf {line.verb} runs no jobs, so that it has no use for the sweep section")
    composer, codes = Composer(line), []
    directory = Path(line.run_dir or ".")
    run = run_plan if line.verb == "plan" else run_report
    for words, (config, error) in [(words, composer.config(words.words, directory)) for words in composer.grid()]:
        log.info("%s", Cell(line.verb, dict(words.overrides)).title())
        try:
            if error is not None:
                raise error
            run(config)
            codes.append(DONE)
        except UserError as refusal:
            print(f"rlhf: error: {refusal}", file=sys.stderr)
            codes.append(REFUSED)
    return DONE if DONE in codes else REFUSED
