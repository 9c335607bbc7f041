"""A study drawn: curves, effects and trade-offs, as PNGs and as SVG that takes its colours from the page. Knows matplotlib.

Figures are made without pyplot, which would hold them all and choose a window system.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.reporting.curves import CURVES, BadCurve, Column, Curve, curve, read_columns
from rlhf.reporting.statistics import Estimate, estimate
from rlhf.reporting.study import COST, KL, Result, Study, values_of

SHOWN = 7
"""Cells that have a colour: the baseline and the best of the others. More lines cannot be told apart."""
COLOURS = ("#4a4e53", "#0f68b3", "#c4501b", "#178259", "#8b4aa5", "#a87400", "#118a9b")
"""The first is the baseline's. On the page they are the variables --c0 to --c6, which differ in the dark."""
INK, MUTED, GRID, OTHER = "#1c1e21", "#5f646a", "#dcdcd6", "#b4b5b0"
THEME = {colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)} | {
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--rule)", OTHER: "var(--faint)",
}  # fmt: skip
PANEL = (3.7, 2.35)
"""Inches of one panel: about the width of a phone at the page's font size."""
CHARACTER = 0.07
"""Inches of a letter in it, about."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.size": 9, "text.color": INK, "legend.frameon": False,
    "text.parse_math": False,  # names are the user's, and may hold dollars
    "axes.edgecolor": MUTED, "axes.linewidth": 0.7, "axes.labelcolor": MUTED, "axes.labelsize": 8.5,
    "axes.titlesize": 9.5, "axes.titlecolor": INK, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "xtick.color": MUTED, "xtick.labelsize": 8.5, "xtick.major.size": 3,
    "ytick.color": MUTED, "ytick.labelsize": 8.5, "ytick.major.size": 0,
}  # fmt: skip

Point = tuple[Result, Estimate, Estimate]
"""A cell, what it costs and what it is worth."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The curves of one metric."""

    metric: str
    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Comparisons of which a reward model is about equally sure."""

    name: str
    """In percent: 50-55."""
    count: int
    predicted: float
    """Mean probability, by the model, that its choice is right."""
    right: float
    """Share where it is."""
    low: float
    high: float
    """Interval of that share."""


def coloured(study: Study) -> dict[str, int]:
    """Name of a cell -> place of its colour in COLOURS; the others are grey."""
    others = [result.name for result in study.ranked() if result.name != study.baseline][: SHOWN - 1]
    return ({study.baseline: 0} if study.baseline is not None else {}) | {name: i for i, name in enumerate(others, 1)}


def panels(study: Study) -> tuple[list[Panel], list[str]]:
    """The curves of the coloured cells, and what is wrong with files that cannot be read. Only runs that are done are in them."""
    colours, complaints = coloured(study), []
    read: dict[str, list[dict[str, Column]]] = {}
    for result in study.results:
        for run in result.cell.runs if result.name in colours else ():
            if run.done:
                try:
                    read.setdefault(result.name, []).append(read_columns(run))
                except BadCurve as error:
                    complaints.append(f"No curve of {run.name}: {error}")
    found = []
    for metric, title in CURVES.items():
        curves = [curve(name, [columns[metric] for columns in read.get(name, []) if metric in columns]) for name in colours]
        if there := tuple(one for one in curves if one is not None):
            found.append(Panel(metric=metric, title=title, curves=there))
    return found, complaints


def tradeoffs(study: Study) -> list[str]:
    """The metrics that the main one is drawn against: the KL and what a run costs, where two cells or more have them."""
    known = {name for run in study.done for name in run.metrics}
    axes = [next((name for name in names if name in known), None) for names in (KL, COST)]
    return [name for name in axes if name is not None and name != study.metric and len(points_of(study, name)) > 1]


# --- panels -----------------------------------------------------------------------------------------------------------------------


def draw_curves(axis: Any, panel: Panel, colours: dict[str, int], *, title: bool = True) -> None:
    for one in panel.curves:
        colour = COLOURS[colours[one.cell]]
        if len(one.steps) == 1:
            axis.plot(one.steps, one.mean, "o", color=colour, markersize=4)
        axis.fill_between(one.steps, one.low, one.high, color=colour, alpha=0.16, linewidth=0)
        axis.plot(one.steps, one.mean, color=colour, linewidth=1.5, linestyle="--" if colours[one.cell] == 0 else "-")
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if title:
        axis.set_title(panel.title)


def draw_tradeoff(axis: Any, study: Study, cost: str, points: Sequence[Point], colours: dict[str, int], *, title: bool = True) -> None:
    """A cross a cell: mean and interval both ways; the line joins those that no other cell beats in both."""
    front = sorted((x.mean, y.mean) for _, x, y in points if not _beaten(x.mean, y.mean, points, study.lower_is_better))
    axis.plot([x for x, _ in front], [y for _, y in front], color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
    for place in (None, *range(len(COLOURS))):
        mine = [(x, y) for result, x, y in points if colours.get(result.name) == place]
        _crosses(axis, [x for x, _ in mine], [y for _, y in mine], place)
    axis.set_xlabel(cost)
    if title:
        axis.set_title(f"{study.metric} against {cost}")


def _crosses(axis: Any, x: Sequence[Estimate], y: Sequence[Estimate | float], place: int | None) -> None:
    """Means with their intervals; a number instead of an estimate has none."""
    if x:
        means = [one.mean if isinstance(one, Estimate) else one for one in y]
        axis.errorbar(
            [one.mean for one in x], means, xerr=_reach(x), yerr=_reach(y), fmt="s" if place == 0 else "o", markersize=4.5, elinewidth=1.2,
            color=OTHER if place is None else COLOURS[place], zorder=2 if place is None else 3,
        )  # fmt: skip


def _reach(of: Sequence[Estimate | float]) -> np.ndarray:
    """From mean to both ends, (2, cells); 0 where there is no interval."""
    pairs = [(one.mean - one.low, one.high - one.mean) if isinstance(one, Estimate) else (0.0, 0.0) for one in of]
    return np.nan_to_num(np.array(pairs, dtype=float)).clip(min=0).T


def _beaten(x: float, y: float, points: Sequence[Point], lower: bool) -> bool:
    sign = -1 if lower else 1
    return any((a.mean <= x and sign * b.mean > sign * y) or (a.mean < x and sign * b.mean >= sign * y) for _, a, b in points)


def points_of(study: Study, cost: str) -> list[Point]:
    """Cells with their estimates of `cost` and of the main metric."""
    found = [(result, estimate(values_of(result.cell.runs, cost)), result.estimates[study.metric or ""]) for result in study.ranked()]
    return [(result, x, y) for result, x, y in found if x.n]


def draw_effects(axis: Any, study: Study, results: Sequence[Result], colours: dict[str, int]) -> None:
    """A line for each cell: its paired differences as dots, their mean and interval."""
    axis.axvline(0, color=MUTED, linewidth=0.8)
    rows = [(len(results) - 1 - i, colours.get(result.name), result.differences[study.metric or ""]) for i, result in enumerate(results)]
    seeds = [(value, y) for y, _, one in rows for value in one.values.values()]
    axis.plot([x for x, _ in seeds], [y for _, y in seeds], "o", color=MUTED, alpha=0.35, markersize=3, markeredgewidth=0)
    for place in (None, *range(len(COLOURS))):
        _crosses(axis, [one for _, its, one in rows if its == place], [y for y, its, _ in rows if its == place], place)
    axis.set_yticks(range(len(results)), [result.name for result in reversed(results)])
    axis.set_ylim(-0.7, len(results) - 0.3)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"difference in {study.metric} to {study.baseline}, seed by seed; 95 % bootstrap interval")


def draw_calibration(axis: Any, points: Sequence[Bin]) -> None:
    """How often a model is right against how sure it is, with intervals; the dashed line is where both are equal."""
    axis.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.8, linestyle="--")
    reach = [[one.right - one.low for one in points], [one.high - one.right for one in points]]
    axis.errorbar(
        [one.predicted for one in points], [one.right for one in points], yerr=np.clip(reach, 0, None), fmt="o-", color=COLOURS[1], markersize=4,
        linewidth=1.5, elinewidth=1.2,
    )  # fmt: skip
    axis.set_xlim(0.49, 1.01)
    axis.set_ylim(min(0.45, *(one.low for one in points)) - 0.02, 1.03)
    axis.set_xlabel("probability that its choice is right, by the model")


def effects_of(study: Study) -> list[Result]:
    """Cells with a paired difference, the best difference first."""
    metric, sign = study.metric or "", 1 if study.lower_is_better else -1
    there = [result for result in study.results if result.differences and result.differences[metric].n]
    return sorted(there, key=lambda result: sign * result.differences[metric].mean)


# --- files ------------------------------------------------------------------------------------------------------------------------


def as_svg(draw: Callable[[Any], None], label: str) -> str:
    """One panel as SVG for the page: its colours are the page's variables, its text is text, and it is as wide as its place.

    Args:
        label: as HTML.
    """
    text = io.StringIO()
    with _style():
        figure = _figure(PANEL, left=0.55, bottom=0.42, right=0.08, top=0.12)
        draw(figure.subplots())
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True)
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda head: f'<svg role="img" aria-label="{label}" {head.group(1)}>', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg).replace("xlink:href", "href")
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return re.sub("|".join(THEME), lambda found: THEME[found.group()], svg)


def save_curves(study: Study, found: Sequence[Panel], file: Path) -> None:
    colours = coloured(study)
    with _style():
        figure, axes = _panels(len(found), min(3, len(found)), 1.0, colours)
        for axis, panel in zip(axes, found, strict=True):
            draw_curves(axis, panel, colours)
        _save(figure, file)


def save_tradeoffs(study: Study, costs: Sequence[str], file: Path) -> None:
    colours = coloured(study)
    with _style():
        figure, axes = _panels(len(costs), len(costs), 1.4, colours)
        for axis, cost in zip(axes, costs, strict=True):
            draw_tradeoff(axis, study, cost, points_of(study, cost), colours)
        _save(figure, file)


def save_effects(study: Study, file: Path) -> None:
    results = effects_of(study)
    names = max(len(result.name) for result in results)
    with _style():
        figure = _figure(
            (6.5 + CHARACTER * names, 0.24 * len(results) + 0.9), left=0.3 + CHARACTER * names, right=0.2, bottom=0.5, top=0.15
        )
        draw_effects(figure.subplots(), study, results, coloured(study))
        _save(figure, file)


def _panels(count: int, columns: int, scale: float, colours: dict[str, int]) -> tuple[Any, list[Any]]:
    """A figure with so many panels and a legend below them."""
    from matplotlib.lines import Line2D

    width, height = PANEL[0] * scale, (PANEL[1] + 0.2) * scale
    rows = -(-count // columns)
    names = [name + (" (baseline)" if place == 0 else "") for name, place in colours.items()]
    across = max(1, min(len(names), int(width * columns / (0.6 + CHARACTER * max(map(len, names))))))
    below = 0.1 + 0.2 * -(-len(names) // across)
    figure = _figure((width * columns, height * rows + below), left=0.55, right=0.12, bottom=0.45 + below, top=0.3)
    spaces = {"wspace": 0.67 / (width - 0.67), "hspace": 0.75 / (height - 0.75)}
    axes = list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=spaces).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    lines = [Line2D([], [], color=COLOURS[place], linestyle="--" if place == 0 else "-") for place in colours.values()]
    figure.legend(lines, names, loc="lower left", ncols=across, fontsize=8.5)
    return figure, axes[:count]


def _figure(size: tuple[float, float], *, left: float, right: float, bottom: float, top: float) -> Any:
    """Margins in inches, as the size. They are given: to find them out costs as much as to draw it all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    figure.subplots_adjust(left=left / size[0], right=1 - right / size[0], bottom=bottom / size[1], top=1 - top / size[1])
    return figure


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _save(figure: Any, file: Path) -> None:
    part = file.with_name(f"{file.stem}.part.png")
    figure.savefig(part, dpi=130, metadata={"Software": None})
    part.rename(file)
