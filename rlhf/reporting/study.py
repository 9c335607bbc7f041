"""A study: runs as cells, each with its metrics, their intervals, and the paired differences to a baseline.

`write_report` is the whole way from folders to files. Knows cells and statistics; how they look is html.py's, figures.py's and
study_table.py's.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import UserError, nearest
from rlhf.reporting.cells import Cell, Grouping, group, text_of
from rlhf.reporting.runs import UNREADABLE, Run, Sweep, find_runs
from rlhf.reporting.statistics import Estimate, estimate, paired, verdict

MAIN = (
    "gold/ppo", "gold/after", "reward/ppo", "reward/after", "rollout/reward", "dpo/accuracy", "reward/accuracy", "sft/eval_loss",
    "sft/perplexity", "perplexity",
)  # fmt: skip
"""Without `report.metric`: the first of these that a finished run has, or else its first metric."""
FURTHER = (
    ("kl", "rollout/kl"), ("reward/ppo", "reward/after", "rollout/reward"), ("length/ppo", "length/after", "rollout/length"),
    ("distinct_2/ppo", "distinct_2/after"), ("gpu_hours", "hours"),
)  # fmt: skip
"""Without `report.metrics`: of each line, the first that there is."""
KL = FURTHER[0]
COST = FURTHER[-1]
START = ("gold/sft", "gold/before", "sft/eval_loss")
"""What tells the SFT models apart that runs start from: the first of these that a run has."""
LOWER = {"loss", "perplexity", "kl", "time", "seconds", "hours", "memory"}
"""Without `report.direction`: less of a metric is better where one of these words is in its name."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A cell and what was measured of it; all mappings by metric."""

    cell: Cell
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    """To the baseline, seed by seed; empty for the baseline itself."""
    verdict: str
    """Of the main metric: helps, hurts, no difference seen, too few seeds; `baseline`; or empty where nothing is measured."""

    @property
    def name(self) -> str:
        return self.cell.name


@dataclass(frozen=True, kw_only=True)
class Study:
    """Runs in cells, with means, intervals and differences: all that a report says."""

    folders: tuple[Path, ...]
    metric: str | None
    """None: no run is done."""
    lower_is_better: bool
    columns: tuple[str, ...]
    """Further metrics."""
    results: tuple[Result, ...]
    baseline: str | None
    grouping: Grouping
    sweeps: tuple[Sweep, ...]
    not_done: tuple[tuple[Run, str], ...]
    """Runs that are in no mean, with the name of their cell, or empty."""
    left_out: tuple[Run, ...]
    """Runs that are done and do not have the metric: no cells are made of them."""
    warnings: tuple[str, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The main one and those further ones, in order; none where no run is done."""
        return () if self.metric is None else (self.metric, *self.columns)

    @property
    def runs(self) -> list[Run]:
        """Those in cells."""
        return [run for result in self.results for run in result.cell.runs]

    @property
    def done(self) -> list[Run]:
        """Of `runs`, those that ended well."""
        return [run for run in self.runs if run.done]

    @property
    def base(self) -> Result | None:
        """The cell that the others are compared with."""
        return next((result for result in self.results if result.name == self.baseline), None)

    def ranked(self) -> list[Result]:
        """Cells with a mean of the main metric, the best first."""
        metric = self.metric or ""
        there = [result for result in self.results if result.estimates and result.estimates[metric].n]
        return sorted(there, key=lambda result: result.estimates[metric].mean * (1 if self.lower_is_better else -1))

    def best(self) -> Result | None:
        """The first of those that have at least half as many seeds as the cell with the most: one lucky seed is no winner."""
        ranked = self.ranked()
        most = max((result.estimates[self.metric or ""].n for result in ranked), default=0)
        return next((result for result in ranked if 2 * result.estimates[self.metric or ""].n >= most), None)


def read_study(
    folders: Iterable[Path], *, metric: str | None, baseline: str | None, metrics: Sequence[str] | None, direction: str | None
) -> Study:
    """What the runs below the folders come to; nothing is written. Arguments as for `write_report`.

    Raises:
        UserError: as `write_report`.
    """
    places = tuple(folders)
    found = find_runs(places)
    metric = _metric(found.runs, metric)
    columns = _columns(found.runs, metric, metrics)
    inside, left_out, outside = _parted(found.runs, metric)
    grouping = group(inside)
    base = _baseline(grouping.cells, baseline, metric)
    lower = lower_is_better(metric or "") if direction is None else direction == "lower"
    shown = (metric, *columns) if metric is not None else ()
    results = tuple(_result(cell, base, shown, lower) for cell in grouping.cells)
    not_done = [(run, cell.name) for cell in grouping.cells for run in cell.runs if not run.done] + [(run, "") for run in outside]
    return Study(
        folders=places, metric=metric, lower_is_better=lower, columns=columns, results=results, baseline=base.name if base else None,
        grouping=grouping, sweeps=found.sweeps, not_done=tuple(not_done), left_out=tuple(left_out),
        warnings=(*_warnings(inside, outside, grouping, shown), *_uncounted([*inside, *left_out], shown)),
    )  # fmt: skip


def lower_is_better(metric: str) -> bool:
    return bool(LOWER & set(re.split(r"[/_]", metric)))


def values_of(runs: Iterable[Run], metric: str) -> dict[int, float]:
    """Seed -> value of the runs that are done; runs of one seed count as one, with their mean."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if run.done and run.seed is not None and metric in run.metrics:
            found.setdefault(run.seed, []).append(run.metrics[metric])
    return {seed: sum(values) / len(values) for seed, values in sorted(found.items())}


def _parted(runs: Sequence[Run], metric: str | None) -> tuple[list[Run], list[Run], list[Run]]:
    """Runs for the cells; runs that are done without the metric; runs that are not done, of another verb and of no named cell."""
    having = [run for run in runs if run.done and metric in run.metrics]
    verbs = {run.verb for run in having} | {""} if having else {run.verb for run in runs}
    inside: list[Run] = []
    left_out: list[Run] = []
    outside: list[Run] = []
    for run in runs:
        if run.done:
            (inside if metric in run.metrics else left_out).append(run)
        else:
            lost = run.status == UNREADABLE and not run.overrides
            (inside if run.cell is not None or (run.verb in verbs and not lost) else outside).append(run)
    return inside, left_out, outside


def _result(cell: Cell, base: Cell | None, metrics: Sequence[str], lower: bool) -> Result:
    estimates = {name: estimate(values_of(cell.runs, name)) for name in metrics}
    differences, said = {}, ""
    if base is cell:
        said = "baseline"
    elif base is not None:
        differences = {name: estimate(paired(estimates[name].values, values_of(base.runs, name))) for name in metrics}
        if metrics and estimates[metrics[0]].n:
            said = verdict(differences[metrics[0]].low, differences[metrics[0]].high, lower_is_better=lower)
    return Result(cell=cell, estimates=estimates, differences=differences, verdict=said)


# --- what was asked for ---------------------------------------------------------------------------------------------------------


def _known(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs if run.done for name in run.metrics))


def _metric(runs: Sequence[Run], asked: str | None) -> str | None:
    known = _known(runs)
    if asked is not None:
        if known and asked not in known:
            raise UserError(f"report.metric={asked}: no finished run has this metric{nearest(asked, known)}; there are {_some(known)}")
        return asked if known else None
    gold = [name for name in known if name.startswith("gold/") and name not in START]
    return next((name for name in (*MAIN[:2], *gold, *MAIN[2:]) if name in known), known[0] if known else None)


def _columns(runs: Sequence[Run], metric: str | None, asked: Sequence[str] | None) -> tuple[str, ...]:
    known = _known(runs)
    if asked is None:
        firsts = [next((name for name in names if name in known), None) for names in FURTHER]
        return tuple(name for name in firsts if name is not None and name != metric)
    for name in asked:
        if known and name not in known:
            raise UserError(f"report.metrics: no finished run has the metric {name}{nearest(name, known)}; there are {_some(known)}")
    return tuple(name for name in dict.fromkeys(asked) if name != metric)


def _some(names: Sequence[str]) -> str:
    shown = [name for name in names if not name.startswith("seconds/")]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _baseline(cells: Sequence[Cell], asked: str | None, metric: str | None) -> Cell | None:
    """The cell of that name or with those values; without a word the first one that has a value."""
    if asked is None:
        measured = [cell for cell in cells if metric is not None and values_of(cell.runs, metric)]
        return next(iter(measured), None)
    named = [cell for cell in cells if cell.name == asked] or [cell for cell in cells if _fits(cell, asked)]
    names = [cell.name for cell in cells]
    if not named:
        raise UserError(f"report.baseline={asked}: no such cell{nearest(asked, names)}; there are {_some(names)}")
    if len(named) > 1:
        raise UserError(f"report.baseline={asked} fits {len(named)} cells, name one of them: {_some([cell.name for cell in named])}")
    return named[0]


def _fits(cell: Cell, asked: str) -> bool:
    """Whether the cell has every `key=value` that is asked for; a key may be shortened to its last parts."""
    words = [word.partition("=") for word in asked.replace(",", " ").split()]
    return bool(words) and all(equals and _has(cell, key, text) for key, equals, text in words)


def _has(cell: Cell, key: str, text: str) -> bool:
    try:
        value = yaml.safe_load(text)
        value = float(text) if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text, re.IGNORECASE) else value
    except yaml.YAMLError:
        value = text
    mine = next((found for known in (cell.settings, cell.config) if (found := _named(known, key))), [])
    return any((other == value and isinstance(other, bool) == isinstance(value, bool)) or text_of(other) == text for other in mine)


def _named(known: Mapping[str, Any], key: str) -> list[Any]:
    """Values of the key, or else of those that end with it."""
    return [known[key]] if key in known else [value for name, value in known.items() if name.endswith((f".{key}", f"@{key}"))]


# --- what a reader must know ------------------------------------------------------------------------------------------------------


def _warnings(inside: Sequence[Run], outside: Sequence[Run], grouping: Grouping, metrics: Sequence[str]) -> Iterable[str]:
    """What makes the comparison less than it seems."""
    done = [run for run in inside if run.done]
    unreadable = [run for run in (*inside, *outside) if run.status == UNREADABLE]
    yield from (f"Not read: {run.reason}" for run in unreadable)
    if (seeds := mixed_starts(done)) and not any(name in START for name in metrics[:1]):
        yield (
            f"Under {_plural('seed', seeds)} some runs start from different SFT models (their {_start(done)} differs), so that paired "
            "differences hold more than the settings."
        )
    for what, values in (
        ("commits", [run.commit or "unknown" for run in done]),
        ("hardware", [run.hardware for run in done if run.hardware]),
    ):
        kinds = Counter(values)
        if len(kinds) > 1:
            yield f"Runs of different {what}: " + ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common()) + "."
    if changed := sorted({run.commit for run in done if run.commit.endswith("+")}):
        yield f"Files differed from the commit when runs began: {', '.join(changed)}."
    for cell in grouping.cells:
        twice = [seed for seed, count in Counter(run.seed for run in cell.runs if run.done).items() if count > 1]
        if twice:
            seeds = sorted(seed for seed in twice if seed is not None)
            yield f"{cell.name} has several runs of {_plural('seed', seeds)}: each seed counts once, with their mean."


def _uncounted(runs: Iterable[Run], metrics: Sequence[str]) -> Iterable[str]:
    """Which metrics of the runs are in no mean."""
    runs = [run for run in runs if run.done]
    for name in metrics:
        lost = {run.name: run.uncounted[name] for run in runs if name in run.uncounted}
        if none := [run for run, value in lost.items() if not math.isfinite(value)]:
            yield f"{name} is no finite number in {', '.join(none)}, which are left out of its means."
        if large := [f"{run} ({value:g})" for run, value in lost.items() if math.isfinite(value)]:
            yield f"{name} is too large a number for a mean in {', '.join(large)}, which are left out of its means."


def mixed_starts(runs: Sequence[Run]) -> list[int]:
    """Seeds whose runs did not start from the same SFT model: its score differs. Runs that train it start from none."""
    runs = [run for run in runs if run.verb != "sft"]
    name = _start(runs)
    seen: dict[int, set[float]] = {}
    for run in runs:
        if run.seed is not None and name in run.metrics:
            seen.setdefault(run.seed, set()).add(round(run.metrics[name], 9))
    return sorted(seed for seed, scores in seen.items() if len(scores) > 1)


def _start(runs: Sequence[Run]) -> str:
    return next((name for name in START if any(name in run.metrics for run in runs)), "")


def _plural(word: str, numbers: Sequence[int]) -> str:
    """`seed 3`, `seeds 0 to 4`, `seeds 0, 2`."""
    if len(numbers) == 1:
        return f"{word} {numbers[0]}"
    run = len(numbers) > 2 and all(b == a + 1 for a, b in itertools.pairwise(numbers))
    return f"{word}s {numbers[0]} to {numbers[-1]}" if run else f"{word}s {', '.join(map(str, numbers))}"
