"""A search as the source of cells: each trial is a cell, or one for each seed.

Knows trials and their cells; what to try next is `rlhf.sweeping.search`'s.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf.cli.sweep.run import Cells
from rlhf.cli.sweep.words import Composer, key_of, plain
from rlhf.config import UserError, nearest
from rlhf.logging import log
from rlhf.settings import SearchSweepConfig
from rlhf.sweeping.cells import Cell, Sweep, read_summary
from rlhf.sweeping.metrics import column
from rlhf.sweeping.scheduler import Task
from rlhf.sweeping.search import Study, Words

if TYPE_CHECKING:
    from rlhf.cli.sweep.command import Command


@dataclass
class Trial:
    """One point of the space and its cells."""

    number: int
    words: Words
    cells: list[Cell]
    values: list[float] = field(default_factory=list)
    """Of the cells that are done."""
    pruned: str | None = None
    told: bool = False


class Search:
    """Asks for trials until there are enough: a source of tasks.

    Args:
        write: keeps the list of cells.
    """

    def __init__(self, cells: Cells, study: Study, composer: Composer, sweep: Sweep, write: Callable[[], None]) -> None:
        self.cells, self.study, self.composer, self.sweep, self.write = cells, study, composer, sweep, write
        self.settings: SearchSweepConfig = study.settings
        self.trials: dict[int, Trial] = {}
        self.todo: list[Cell] = []
        for number, words in study.unfinished():
            self._begin(number, words)

    # --- the source ------------------------------------------------------------------------------------------------------------

    def next(self) -> Task | None:
        while True:
            while self.todo:
                cell = self.todo.pop(0)
                assert cell.trial is not None
                if self.trials[cell.trial].told:
                    continue
                if self.cells.add(cell, *self.composer.config(self._job_words(cell), self.cells.folder(cell))):
                    return self.cells.task(cell)
                self._note(cell, read_summary(self.cells.folder(cell)) or {})
            if self.study.begun >= self.settings.trials:
                return None
            self._begin(*self.study.ask())

    def watch(self, task: Task) -> str | None:
        trial = self._trial_of(task)
        if trial.told and trial.pruned is not None:
            return trial.pruned  # another seed of a trial that was stopped
        if self.settings.prune_on is None or task.name != trial.cells[0].folder:
            return None
        values = column(self.cells.folder(trial.cells[0]), self.settings.prune_on)
        reason = self.study.watch(trial.number, values or [])
        if reason is not None:
            trial.pruned = reason
            self._tell(trial, None)
        return reason

    def ended(self, task: Task, code: int, *, stopped: str | None, interrupted: bool) -> None:
        trial = self._trial_of(task)
        cell = next(cell for cell in trial.cells if cell.folder == task.name)
        summary = self.cells.end(cell, code, stopped=stopped, interrupted=interrupted)
        if not interrupted or summary["status"] == "done":
            self._note(cell, summary)

    # --- trials ----------------------------------------------------------------------------------------------------------------

    def _trial_of(self, task: Task) -> Trial:
        return next(trial for trial in self.trials.values() if any(cell.folder == task.name for cell in trial.cells))

    def _begin(self, number: int, words: Words) -> None:
        """Lists the cells of a trial, those it has from an earlier command included."""
        cells = [cell for cell in self.sweep.cells if cell.trial == number]
        values = {key.lstrip("+"): plain(self.composer.parser.parse_override(f"k={word}").value()) for key, word in words.items()}
        for overrides in [{**values, "seed": seed} for seed in self.settings.seeds] or [values]:
            if all(cell.overrides != overrides for cell in cells):
                cell = Cell(str(len(self.sweep.cells)), overrides, number)
                cells.append(cell)
                self.sweep.cells.append(cell)
        self.write()
        self.trials[number] = Trial(number, words, cells)
        self.todo += cells

    def _job_words(self, cell: Cell) -> list[str]:
        assert cell.trial is not None
        trial = self.trials[cell.trial]
        seed = [f"seed={cell.overrides['seed']}"] if self.settings.seeds else []
        return [*self.composer.fixed, *(f"{key}={word}" for key, word in trial.words.items()), *seed]

    def _note(self, cell: Cell, summary: dict[str, Any]) -> None:
        """Counts what a cell of a trial has come to; the last one, or one that failed, decides the trial.

        Raises:
            UserError: a run that is done has no such metric, or column, so that no other will.
        """
        assert cell.trial is not None
        trial = self.trials[cell.trial]
        if trial.told:
            return
        if summary["status"] != "done":
            self._tell(trial, None)
            return
        metrics, prune_on = summary["metrics"], self.settings.prune_on
        if self.settings.metric not in metrics:
            raise UserError(
                f"sweep.metric={self.settings.metric} is no metric of cell {cell.folder}{nearest(self.settings.metric, metrics)}; "
                f"its summary.json lists them"
            )
        if prune_on is not None:
            values = column(self.cells.folder(cell), prune_on)
            if values is None:
                raise UserError(f"sweep.prune_on={prune_on} is no column of the metrics.csv of cell {cell.folder}")
            if cell is trial.cells[0]:
                self.study.watch(trial.number, values)  # the last steps, for later trials to be compared with
        trial.values.append(float(metrics[self.settings.metric]))
        if len(trial.values) == len(trial.cells):
            self._tell(trial, math.fsum(trial.values) / len(trial.values))

    def _tell(self, trial: Trial, value: float | None) -> None:
        trial.told = True
        self.study.tell(trial.number, value, pruned=trial.pruned is not None)


def start_search(command: Command) -> int:
    """Runs or goes on with a search; says which trial is the best, and how to run it. Returns the exit code.

    Raises:
        UserError: there is nothing to search, or a seed is among it.
    """
    composer, settings, sweep = command.composer, command.settings, command.sweep
    assert isinstance(settings, SearchSweepConfig)
    space = composer.space()
    if not space:
        raise UserError("sweep=optuna has nothing to search: name values, as in 'ppo.kl_coef=interval(0.01,0.2)'")
    if "seed" in space:
        raise UserError("seed is no dimension of a search, which would pick the luckiest: sweep.seeds=[0,1] runs each trial with both")
    if settings.seeds and any(key_of(word) == "seed" for word in composer.fixed):
        raise UserError("seed and sweep.seeds both say which seeds a trial has: leave one of them out")
    probe, _ = composer.config(composer.fixed, command.directory / "0")
    place = command.place([probe])
    with command.owned():
        sweep.cells = list(command.old.cells) if command.old is not None else []
        sweep.write(command.directory)
        study = Study(command.directory, settings, space, parallel=place.slots > 1, resume=command.old is not None)
        cells = Cells(command.directory, place, resumed=command.old is not None, wanted=settings.metric)
        log.info("%d trials, %d of them begun, %d cells at a time, in %s", settings.trials, study.begun, place.slots, command.directory)
        source = Search(cells, study, composer, sweep, lambda: sweep.write(command.directory))
        code = command.finish(source, place)
        best = study.best()
        if best is not None:
            named = [word for flag, value in (("-cn", sweep.config_name), ("-cd", sweep.config_dir)) if value for word in (flag, value)]
            words = shlex.join([*named, *composer.fixed, *(f"{key}={word}" for key, word in best.words.items())])
            log.info("best: trial %d, %s=%.6g", best.trial, settings.metric, best.value)
            log.info("run it with: rlhf %s %s", sweep.verb, words)
    return code
