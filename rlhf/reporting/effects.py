"""Paired differences for the page, as rows whose drawing is as wide as its place: SVG in percent, with no scale of its own.

Knows HTML and SVG; the PNG of the same is in figures.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from rlhf.reporting.figures import coloured
from rlhf.reporting.study import Result, Study
from rlhf.reporting.words import digits_of, interval, number


def forest(study: Study, results: Sequence[Result]) -> str:
    """A row for each cell: name, dots and interval, the numbers."""
    metric = study.metric or ""
    digits, colours = digits_of(study, metric), coloured(study)
    ends = [0.0]
    for result in results:
        one = result.differences[metric]
        ends += [*one.values.values(), *(end for end in (one.low, one.high) if not math.isnan(end))]
    step = nice_step(max(ends) - min(ends))
    low, high = math.floor(min(ends) / step) * step, math.ceil(max(ends) / step) * step
    if low == high:  # no cell differs from the baseline at all
        low, high = low - step, high + step
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    rows = "".join(_row(result, metric, digits, (low, high), ticks, colours) for result in results)
    shown = max(0, -math.floor(math.log10(step)))
    axis = "".join(
        f'<text x="{_at(tick, low, high)}" y="11" text-anchor="middle">{number(tick, shown, sign=True)}</text>' for tick in ticks
    )
    return f"<ol class=effects>\n{rows}<li class=axis aria-hidden=true><span></span><svg>{axis}</svg><span></span></li></ol>"


def nice_step(width: float) -> float:
    """1, 2 or 5 times a power of ten, so that three to six steps make up the width."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if width / (power * factor) <= 5)


def _row(result: Result, metric: str, digits: int, ends: tuple[float, float], ticks: Sequence[float], colours: dict[str, int]) -> str:
    one = result.differences[metric]
    place = colours.get(result.name)
    colour = "var(--muted)" if place is None else f"var(--c{place})"
    parts = [
        f'<line class={"zero" if abs(tick) < 1e-12 else "tick"} x1="{_at(tick, *ends)}" x2="{_at(tick, *ends)}" y1="0" y2="100%"/>'
        for tick in ticks
    ]
    parts += [f'<circle class=seed cx="{_at(value, *ends)}" cy="50%" r="2.5"/>' for value in one.values.values()]
    if one.n > 1:
        parts.append(f'<line class=span x1="{_at(one.low, *ends)}" x2="{_at(one.high, *ends)}" y1="50%" y2="50%"/>')
    parts.append(f'<circle cx="{_at(one.mean, *ends)}" cy="50%" r="4.5"/>')
    said = number(one.mean, digits, sign=True) + (
        f" <small>({interval(one.low, one.high, digits, sign=True)})</small>" if one.n > 1 else ""
    )
    return (
        f'<li><span class=name>{escape(result.name)}</span><svg aria-hidden=true style="color:{colour}">{"".join(parts)}</svg>'
        f"<span class=number>{said}</span></li>\n"
    )


def _at(value: float, low: float, high: float) -> str:
    """A margin of 7 % on both sides keeps dots and numbers inside."""
    return f"{7 + 86 * (value - low) / (high - low):.2f}%"
