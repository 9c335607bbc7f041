"""report.html: one page that needs nothing but itself. Knows HTML; page.html, page.css and page.js beside this file are its frame.

Everything that comes from a run is escaped. The page forbids itself any request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from rlhf.reporting import figures
from rlhf.reporting.cells import text_of
from rlhf.reporting.effects import forest
from rlhf.reporting.evaluated import Evaluated, evaluated_section
from rlhf.reporting.figures import Panel
from rlhf.reporting.markup import breakable, estimate_cell, framed, number_cell, plain_table, section, sortable, value_cell
from rlhf.reporting.runs import Run, shown
from rlhf.reporting.statistics import BAND_DRAWS, DRAWS, FEW, Estimate, width_beside_student
from rlhf.reporting.steps_page import steps_section
from rlhf.reporting.study import Result, Study
from rlhf.reporting.words import NOTHING, caveats, counts, digits_of, headline, title

MARKS = {"helps": "▲", "hurts": "▼", "no difference seen": "=", "too few seeds": "?", "baseline": "◆"}
VALUES = 12
"""Of a setting, so many values are listed."""
HOW = """
<p>Runs that differ in nothing but the seed, and in what follows from it, are one cell. Only runs whose status is <em>done</em> have a
say. The standard deviation is that of the sample, with n &minus; 1.</p>
<p>Intervals are the 2.5th to 97.5th percentile of {draws:,} bootstrap means over seeds, drawn with a fixed generator ({band_draws:,} means
for the bands of curves). With few seeds they are too narrow: about {widths} seeds, as a share of the width of Student&rsquo;s interval. So
the table also says whether Student&rsquo;s interval of the same differences is without 0.</p>
<p>A difference is a cell&rsquo;s value less the baseline&rsquo;s of the same seed; seeds that only one of them has are left out.
<em>Helps</em> and <em>hurts</em> say that the bootstrap interval of the difference is without 0, <em>no difference seen</em> that it is not,
<em>too few seeds</em> that there are fewer than two pairs. Nothing is corrected for the number of comparisons.</p>
<p>The best cell is the one with the best mean among those with at least half as many seeds as the cell with the most.</p>
"""


def as_html(study: Study, found: Sequence[Panel], costs: Sequence[str], out: Path, evaluated: Evaluated | None = None) -> str:
    """The page. Links to logs are relative to `out`, where they lie below it."""
    sections = [
        _head(study), _warnings(study), _table(study), _effects(study), steps_section(study),
        "" if evaluated is None else evaluated_section(evaluated), _tradeoffs(study, costs), _curves(study, found),
        _not_done(study, out), _what_was_run(study), _every_run(study), _how(),
    ]  # fmt: skip
    return Template(_part("page.html")).substitute(
        title=escape(title(study)), style=_part("page.css"), script=_part("page.js"), sections="".join(sections)
    )


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip()


# --- what it comes to -------------------------------------------------------------------------------------------------------------


def _head(study: Study) -> str:
    said = "".join(f"<p>{escape(text)}</p>" for text in caveats(study))
    facts = {"Runs": counts(study), "Cells": str(len(study.results)), "Seeds": _seeds(study)}
    if study.metric is not None and len(study.results) > 1:
        facts["Baseline"] = study.baseline or NOTHING
        facts["Better is"] = "lower" if study.lower_is_better else "higher"
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    best = study.best()
    lead = escape(headline(study))
    lead = lead if best is None else lead.replace(escape(best.name), f"<strong>{escape(best.name)}</strong>", 1)
    return f"<header><h1>{escape(title(study))}</h1><p class=lead>{lead}</p>{said}<dl class=facts>{listed}</dl></header>\n"


def _seeds(study: Study) -> str:
    seeds = sorted({run.seed for run in study.runs if run.seed is not None})
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds)) or NOTHING


def _warnings(study: Study) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in study.warnings)
    return f"<aside class=warnings aria-label=Warnings><ul>{items}</ul></aside>\n" if items else ""


# --- the table of cells -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    heading: str
    cell: Callable[[Result], str]
    """The `td` of a row."""
    kind: str = ""
    """Columns of words are classed `word`, and begin at their left."""


def _table(study: Study) -> str:
    if study.metric is None or not study.results:
        return ""
    columns = _columns(study, study.metric)
    colours = figures.coloured(study)
    rows = "".join(
        f'<tr><th scope=row data-v="{escape(result.name)}">{_swatch(colours.get(result.name))}{escape(result.name)}</th>'
        f"{''.join(column.cell(result) for column in columns)}</tr>\n"
        for result in study.results
    )
    heads = [("Cell", ""), *((column.heading, column.kind) for column in columns)]
    return section("cells", "Cells", sortable(heads, rows, "cells") + f"<p class=note>{_notes(study)}</p>")


def _columns(study: Study, metric: str) -> list[Column]:
    """All but the cell's name. What no cell can have is left out: a difference to nothing, the spread of one seed."""
    digits = {name: digits_of(study, name) for name in study.metrics}
    columns = [
        Column("Seeds", lambda result: value_cell(result.cell.counts(), result.estimates[metric].n)),
        Column(metric, _mean_of(metric, digits[metric])),
    ]
    if _has_spread(study):
        columns.append(Column("sd", lambda result: number_cell(result.estimates[metric].sd, digits[metric])))
    if len(study.results) > 1:
        heading = f"Difference to {study.baseline}"
        columns.append(Column(heading, lambda result: estimate_cell(result.differences.get(metric), digits[metric], sign=True)))
    if len(study.results) > 1 and _has_spread(study):
        columns += [
            Column("By Student's\u00a0t", lambda result: _by_student(result.differences.get(metric)), "word"),
            Column("Verdict", _verdict, "word"),
        ]
    return columns + [Column(name, _mean_of(name, digits[name])) for name in study.columns]


def _mean_of(metric: str, digits: int) -> Callable[[Result], str]:
    return lambda result: estimate_cell(result.estimates[metric], digits)


def _has_spread(study: Study) -> bool:
    return any(one.n > 1 for result in study.results for one in result.estimates.values())


def _notes(study: Study) -> str:
    """What the columns say."""
    if not _has_spread(study):
        return "One seed each: there are no intervals."
    notes = "Mean over seeds; below it the 95\u00a0% bootstrap interval. sd: standard deviation over seeds."
    if len(study.results) > 1:
        notes += " The difference is paired by seed. By Student&rsquo;s t: whether that interval, too, is without 0."
    if any(not run.done for run in study.runs):
        notes += " Where not all runs of a cell are done, its mean is that of the others."
    if any(one.too_narrow for result in study.results for one in (*result.estimates.values(), *result.differences.values())):
        notes += f" †: fewer than {FEW} seeds, so that the interval is too narrow."
    return notes


def _by_student(one: Estimate | None) -> str:
    said = "" if one is None or one.n < 2 else "without 0" if one.excludes_zero_by_student else "holds 0"
    return value_cell(said or NOTHING, said, "word")


def _verdict(result: Result) -> str:
    said = result.verdict
    return f'<td class="word {said.split(" ")[0]}" data-v="{said}"><span aria-hidden=true>{MARKS.get(said, "")}</span> {said}</td>'


def _swatch(place: int | None) -> str:
    return "" if place is None else f'<i class=swatch style="background:var(--c{place})"></i>'


# --- drawings ---------------------------------------------------------------------------------------------------------------------


def _effects(study: Study) -> str:
    results = figures.effects_of(study)
    if not results:
        return ""
    note = f"{study.metric} less that of {study.baseline}, seed by seed, the best first: the mean with its 95\u00a0% bootstrap interval, "
    note += "and each seed as a small dot."
    return section("effects", "Differences to the baseline", forest(study, results) + f"<p class=note>{escape(note)}</p>")


def _legend(study: Study, others: bool) -> str:
    items = []
    for name, place in figures.coloured(study).items():
        line, after = ("line dashed", " (baseline)") if place == 0 else ("line", "")
        items.append(f'<li><i class="{line}" style="color:var(--c{place})"></i>{escape(name)}{after}</li>')
    if others and len(study.ranked()) > len(items):
        items.append("<li><i class=line style=color:var(--faint)></i>other cells</li>")
    return f"<ul class=legend>{''.join(items)}</ul>"


def _tradeoffs(study: Study, costs: Sequence[str]) -> str:
    if not costs:
        return ""
    colours = figures.coloured(study)

    def panel(cost: str) -> str:
        points = figures.points_of(study, cost)
        label = escape(f"{study.metric} against {cost}, a cross for each cell", quote=True)
        svg = figures.as_svg(lambda axis: figures.draw_tradeoff(axis, study, cost, points, colours, title=False), label)
        return framed(svg, f"{escape(study.metric or '')} against <span>{escape(cost)}</span>")

    note = "Means over seeds with their intervals both ways. The dotted line joins the cells that no other beats in both."
    drawn = "".join(map(panel, costs))
    return section("tradeoffs", "Trade-offs", f"{_legend(study, True)}<div class=panels>{drawn}</div><p class=note>{note}</p>")


def _curves(study: Study, found: Sequence[Panel]) -> str:
    if not found:
        return ""
    colours = figures.coloured(study)

    def panel(one: Panel) -> str:
        label = escape(f"{one.title} by step, a line for each cell", quote=True)
        svg = figures.as_svg(lambda axis: figures.draw_curves(axis, one, colours, title=False), label)
        return framed(svg, f"{escape(one.title[:1].upper() + one.title[1:])} <code>{escape(one.metric)}</code>")

    hidden = len(study.ranked()) - len(colours)
    note = "Mean over the seeds that are done, with its 95\u00a0% bootstrap interval."
    if hidden > 0:
        note += f" Drawn are the baseline and the {len(colours) - 1} best of the other cells; {hidden} are in the table only."
    drawn = "".join(map(panel, found))
    return section("curves", "Curves", f"{_legend(study, False)}<div class=panels>{drawn}</div><p class=note>{note}</p>")


# --- runs -------------------------------------------------------------------------------------------------------------------------


def _not_done(study: Study, out: Path) -> str:
    parts = ""
    if study.not_done:
        rows = "".join(
            f"<tr><th scope=row>{breakable(run.name)}{_log(run, out)}</th><td class=word>{escape(cell)}</td><td>{_seed(run)}</td>"
            f'<td class=word>{escape(run.status)}</td><td class="word reason">{escape(run.reason)}</td></tr>\n'
            for run, cell in study.not_done
        )
        heads = (("Run", ""), ("Cell", "word"), ("Seed", ""), ("Status", "word"), ("Reason", "word"))
        parts += "<p>These are in no mean.</p>" + plain_table(heads, rows, "runs that are not done")
    if study.left_out:
        names = ", ".join(breakable(run.name) for run in study.left_out)
        said = escape(f"{len(study.left_out)} runs are done and have no {study.metric}")
        parts += f"<details><summary>{said}</summary><p>{names}</p></details>"
    return section("not-done", "Runs that are not in the table", parts) if parts else ""


def _log(run: Run, out: Path) -> str:
    if run.log is None:
        return ""
    try:
        link = run.log.resolve().relative_to(out.resolve()).as_posix()
    except ValueError:
        return f"<small>{breakable(shown(run.log))}</small>"
    return f'<small><a href="{escape(link, quote=True)}">{escape(link)}</a></small>'


def _seed(run: Run) -> str:
    return NOTHING if run.seed is None else str(run.seed)


def _every_run(study: Study) -> str:
    if not study.runs:
        return ""
    metric = study.metric or ""
    digits = digits_of(study, metric) if study.metric is not None else 0
    rows = "".join(
        f'<tr><th scope=row data-v="{escape(run.name)}">{breakable(run.name)}</th>'
        f'<td class=word data-v="{escape(result.name)}">{breakable(result.name)}</td>{value_cell(_seed(run), _seed(run))}'
        f"{value_cell(run.status, run.status, 'word')}{number_cell(run.metrics.get(metric, math.nan), digits)}"
        f"{value_cell(run.commit or NOTHING, run.commit, 'word')}</tr>\n"
        for result in study.results for run in result.cell.runs
    )  # fmt: skip
    heads = (("Run", ""), ("Cell", "word"), ("Seed", ""), ("Status", "word"), (metric or "Metric", ""), ("Commit", "word"))
    table = sortable(heads, rows, "runs")
    return section("runs", "Every run", f"<details><summary>{len(study.runs)} runs</summary>{table}</details>")


def _what_was_run(study: Study) -> str:
    commands = "".join(f"<pre><code>{escape(sweep.command)}</code></pre>" for sweep in study.sweeps)
    rows = [("Folders", ", ".join(map(shown, study.folders))), ("Commit", _listed(run.commit or "unknown" for run in study.done))]
    rows += [("Hardware", _listed(run.hardware or "unknown" for run in study.done))]
    for key in study.grouping.named_by:
        rows.append((key, _listed(text_of(result.cell.settings.get(key)) for result in study.results)))
    if study.grouping.with_them:
        rows.append(
            (
                "Also differs" if study.grouping.named_by else "Differs",
                ", ".join(study.grouping.with_them[:VALUES]) + _more(study.grouping.with_them),
            )
        )
    if study.grouping.with_seed:
        rows.append(("Follows the seed", ", ".join(study.grouping.with_seed)))
    listed = "".join(f"<div><dt>{breakable(name)}</dt><dd>{breakable(text or NOTHING)}</dd></div>" for name, text in rows)
    return section("what", "What was run", f"{commands}<dl class=list>{listed}</dl>")


def _listed(texts: Iterable[str]) -> str:
    different = list(dict.fromkeys(texts))
    return ", ".join(different[:VALUES]) + _more(different)


def _more(items: Sequence[str]) -> str:
    return f" and {len(items) - VALUES} more" if len(items) > VALUES else ""


def _how() -> str:
    widths = ", ".join(f"{100 * width_beside_student(n):.0f}\u00a0% with {n}" for n in (3, 5, 10))
    return section("how", "How it was computed", HOW.format(draws=DRAWS, band_draws=BAND_DRAWS, widths=widths))
