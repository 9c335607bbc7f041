"""A study in words and rounded numbers: the verdict at the top, what qualifies it, how many runs did what.

Knows sentences; computes nothing but rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from rlhf.reporting.cells import short_keys
from rlhf.reporting.statistics import FEW, Estimate, width_beside_student
from rlhf.reporting.study import Result, Study

NOTHING = "–"  # noqa: RUF001
MINUS = "−"  # noqa: RUF001
WHOLE = 1e15
"""From here on a number is written with a power of ten."""
MANY = 5
"""Comparisons from which on the page counts how many would be beside the point by chance."""


def decimals(estimates: Iterable[Estimate]) -> int:
    """So many that the spread of a column has two digits; without spread, that its largest number has three."""
    known = [one for one in estimates if one.n]
    spreads = sorted(one.sd for one in known if one.sd > 0)
    if spreads:
        return min(6, max(0, 1 - math.floor(math.log10(spreads[len(spreads) // 2]))))
    largest = max((abs(one.mean) for one in known), default=0.0)
    return min(6, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 2


def number(value: float, digits: int, *, sign: bool = False) -> str:
    if math.isnan(value):
        return NOTHING
    text = f"{abs(value):,.{digits}f}" if abs(value) < WHOLE else f"{abs(value):.3g}"
    zero = not text.strip("0.,")
    return ("" if zero else MINUS if value < 0 else "+" if sign else "") + text


def interval(low: float, high: float, digits: int, *, sign: bool = False) -> str:
    return NOTHING if math.isnan(low) else f"{number(low, digits, sign=sign)} to {number(high, digits, sign=sign)}"


def digits_of(study: Study, metric: str) -> int:
    return decimals(result.estimates[metric] for result in study.results if metric in result.estimates)


def headline(study: Study) -> str:
    """The answer in one or two sentences."""
    best, metric = study.best(), study.metric
    if best is None or metric is None:
        return "No run is done yet." if not study.left_out else f"No run has a value of {metric}."
    others = [result for result in study.ranked() if result is not best]
    said = f"{metric} {_estimate(best, study)}"
    if not others:
        return f"{best.name}: {said}. There is no other cell to compare it with."
    if best.name != study.baseline:
        difference = best.differences[metric]
        if not difference.n:
            return f"{best.name} is best: {said}. It shares no seed with the baseline {study.baseline}."
        return f"{best.name} is best: {said}, {_difference(difference, study)} against the baseline {study.baseline}{_judged(best)}."
    next_best = others[0]
    against = f"{best.name}, the baseline, is best: {said}. Next is {next_best.name}"
    if not next_best.differences[metric].n:
        return f"{against}, {_estimate(next_best, study)}."
    return f"{against}, {_difference(next_best.differences[metric], study)} against it{_judged(next_best)}."


def _estimate(result: Result, study: Study) -> str:
    metric = study.metric or ""
    one, digits = result.estimates[metric], digits_of(study, metric)
    spread = f"{interval(one.low, one.high, digits)}, {one.n} seeds" if one.n > 1 else "1 seed"
    lost = sum(not run.done for run in result.cell.runs)
    missing = f"; {lost} of its {len(result.cell.runs)} runs {'is' if lost == 1 else 'are'} not done" if lost else ""
    return f"{number(one.mean, digits)} ({spread}{missing})"


def _difference(one: Estimate, study: Study) -> str:
    digits = digits_of(study, study.metric or "")
    spread = f" ({interval(one.low, one.high, digits, sign=True)})" if one.n > 1 else ""
    return f"{number(one.mean, digits, sign=True)}{spread}"


def _judged(result: Result) -> str:
    return {"no difference seen": ", which is no difference to be seen", "too few seeds": ", from one seed"}.get(result.verdict, "")


def caveats(study: Study) -> list[str]:
    """What qualifies the headline, in order of weight."""
    best, metric = study.best(), study.metric
    if best is None or metric is None:
        return []
    found = []
    compared = [result for result in study.results if result.differences and result.differences[metric].n > 1]
    shown = best if best.name != study.baseline else next((result for result in study.ranked() if result is not best), best)
    difference = shown.differences.get(metric)
    if difference is not None and difference.n > 1 and difference.excludes_zero != difference.excludes_zero_by_student:
        digits = digits_of(study, metric)
        by_student = interval(difference.student_low, difference.student_high, digits, sign=True)
        found.append(f"By Student's t the interval of this difference is {by_student}, which holds 0.")
    n = min(one.n for one in (best.estimates[metric], difference) if one is not None)
    if n == 1:
        found.append("With one seed there is no interval." + ("" if difference is None else " The difference may be chance."))
    elif 2 <= n < FEW:
        found.append(
            f"With {n} seeds a bootstrap interval is too narrow: about {100 * width_beside_student(n):.0f} % as wide as Student's."
        )
    if len(compared) >= MANY:
        outside = sum(result.verdict in ("helps", "hurts") for result in compared)
        chance = 0.05 * len(compared)
        said = f"{outside} of {len(compared)} comparisons have an interval without 0"
        lucky = "" if best.name == study.baseline else "; the best of several looks better than it is"
        found.append(said + (f"; about {chance:.0f} would by chance alone, and more with few seeds." if chance >= 1 else f"{lucky}."))
    return found


def counts(study: Study) -> str:
    """`58 of 60 runs are done, 1 failed, 1 diverged`; what is left out follows."""
    runs = [*study.runs, *(run for run, cell in study.not_done if not cell)]
    done = sum(run.done for run in runs)
    kinds = Counter(run.status for run in runs if not run.done)
    parts = [
        f"{done} of {len(runs)} runs {'is' if done == 1 else 'are'} done",
        *(f"{count} {status}" for status, count in kinds.most_common()),
    ]
    if study.left_out:
        parts.append(f"{len(study.left_out)} more without {study.metric}")
    return ", ".join(parts)


def title(study: Study) -> str:
    """What the study is about."""
    keys = list(short_keys(study.grouping.named_by).values())
    if study.metric is None:
        return "A study of runs"
    if not keys:
        return f"{study.metric} in {len(study.results)} cells" if len(study.results) > 1 else f"{study.metric} of {study.results[0].name}"
    if len(keys) > 3:
        return f"{study.metric} by {len(keys)} settings"
    return f"{study.metric} by {', '.join(keys[:-1])}{' and ' if len(keys) > 1 else ''}{keys[-1]}"
