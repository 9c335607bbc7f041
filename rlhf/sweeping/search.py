"""A search over a space: Optuna proposes trials, hears their values, and says which to stop.

Knows Optuna; knows no run. Optuna is imported when a search begins, as the command must not wait for it.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import UserError
from rlhf.settings import SearchSweepConfig

JOURNAL = "study.journal"


@dataclass(frozen=True)
class Choice:
    """One of some words, without an order."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Number:
    """A number between two others, both included."""

    low: float
    high: float
    whole: bool
    log: bool = False
    step: float | None = None


Dimension = Choice | Number
Words = dict[str, str]
"""What a trial sets: the word behind `key=`, by key."""


@dataclass(frozen=True)
class Best:
    trial: int
    value: float
    words: Words


class Study:
    """A study by ask and tell, kept on disk: opened again it goes on.

    Every proposal comes from a sampler seeded by `sampler_seed` and the number of the trial, so that a search of one trial at a time
    proposes the same after a resume as without.

    Args:
        parallel: trials run at the same time, so that those that run are taken for bad ones.
        resume: the study is there already.

    Raises:
        UserError: Optuna is not installed, or refuses the space or the storage.
    """

    def __init__(
        self, directory: Path, settings: SearchSweepConfig, space: Mapping[str, Dimension], *, parallel: bool, resume: bool = False
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError("sweep=optuna needs Optuna: pip install -e '.[search]' in the checkout") from error
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.settings, self.parallel = optuna, settings, parallel
        try:
            self.space = {key: self._distribution(one) for key, one in space.items()}
        except ValueError as error:
            raise UserError(f"the search space is refused: {error}") from error
        storage = settings.storage or _journal(optuna, directory / JOURNAL)
        name = str(directory.resolve()) if settings.storage else "sweep"  # a database may hold other studies
        try:
            self.study = optuna.create_study(
                storage=storage, study_name=name, direction=settings.direction, pruner=self._pruner(), load_if_exists=resume
            )
        except optuna.exceptions.DuplicatedStudyError as error:
            raise UserError(f"sweep.storage={storage} holds a study of {name} already: choose another run_dir") from error
        except Exception as error:
            raise UserError(f"sweep.storage={storage} cannot be opened: {' '.join(str(error).split())}") from error

    def _distribution(self, one: Dimension) -> Any:
        kinds = self.optuna.distributions
        if isinstance(one, Choice):
            return kinds.CategoricalDistribution(one.words)
        if one.whole:
            return kinds.IntDistribution(int(one.low), int(one.high), log=one.log, step=int(one.step or 1))
        return kinds.FloatDistribution(one.low, one.high, log=one.log, step=one.step)

    def _pruner(self) -> Any:
        if self.settings.pruner == "none":
            return self.optuna.pruners.NopPruner()
        return self.optuna.pruners.MedianPruner(n_startup_trials=self.settings.prune_trials, n_warmup_steps=self.settings.prune_after + 1)

    def _sampler(self, number: int) -> Any:
        word = f"{self.settings.sampler_seed} {number}"  # hashed: sums of the two would meet in other searches
        samplers, seed = self.optuna.samplers, int.from_bytes(hashlib.sha256(word.encode()).digest()[:4])
        if self.settings.sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=self.parallel)

    @property
    def begun(self) -> int:
        """Trials asked for so far."""
        return len(self.study.get_trials(deepcopy=False))

    def ask(self) -> tuple[int, Words]:
        """A new trial: its number and what it sets."""
        self.study.sampler = self._sampler(self.begun)
        trial = self.study.ask(self.space)
        return trial.number, self._words(trial.params)

    def unfinished(self) -> list[tuple[int, Words]]:
        """Trials that were asked for and not told about: an earlier command was ended in the middle of them."""
        running = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,))
        return [(trial.number, self._words(trial.params)) for trial in running]

    def _words(self, params: Mapping[str, Any]) -> Words:
        return {key: value if isinstance(value, str) else repr(value) for key, value in params.items()}

    def watch(self, number: int, values: Sequence[tuple[int, float]]) -> str | None:
        """Reports what a trial has reached at its steps; returns why it should be stopped, or None."""
        frozen = self.study.get_trials(deepcopy=False)[number]
        trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
        for step, value in values:
            if step in frozen.intermediate_values:
                continue
            trial.report(value, step)
            if trial.should_prune():
                return f"{self.settings.prune_on}={value:.6g} at step {step} is worse than the median of the finished trials"
        return None

    def tell(self, number: int, value: float | None, *, pruned: bool = False) -> None:
        """The value of a trial; None, or one that is not finite: it failed."""
        states = self.optuna.trial.TrialState
        if pruned:
            self.study.tell(number, state=states.PRUNED)
        elif value is None or not math.isfinite(value):
            self.study.tell(number, state=states.FAIL)
        else:
            self.study.tell(number, value)

    def best(self) -> Best | None:
        """The best finished trial; None where none has finished."""
        if not self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.COMPLETE,)):
            return None
        trial = self.study.best_trial
        return Best(trial.number, self.study.best_value, self._words(trial.params))


class _Unlocked:
    """Stands for the lock of a journal: the directory of a sweep has one owner at a time."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _journal(optuna: Any, file: Path) -> Any:
    """A storage in one file. A command that was killed may have left half a line, which nobody has seen."""
    if file.is_file():
        whole = file.read_bytes()
        with file.open("r+b") as f:
            f.truncate(whole.rfind(b"\n") + 1)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file), lock_obj=_Unlocked()))
