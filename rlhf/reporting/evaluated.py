"""What `rlhf evaluate` found, as a section of the page: the policies side by side, the reward model's calibration, prompts with their answers.

Knows HTML. The rows are those that the evaluation itself prints, and are handed in: whoever has measured them knows their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rlhf.reporting import figures
from rlhf.reporting.figures import Bin
from rlhf.reporting.markup import framed, plain_table, section
from rlhf.reporting.words import MINUS, NOTHING, number

NO_BREAK = "\u2011"
"""A hyphen at which no line ends."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    policy: str
    text: str
    said: str
    """Scores and length, in words."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and what each policy answers."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation, as far as its files tell."""

    heads: tuple[str, ...]
    """Of the table; the first is of the measures' names."""
    rows: tuple[tuple[str, ...], ...]
    """Cells as they are printed; a measure that is part of the one above it begins with blanks."""
    missing: str
    """What a cell says that has no number."""
    caption: str
    calibration: tuple[Bin, ...]
    """Empty: no reward model was judged."""
    calibration_error: float | None
    fixed: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    complaints: tuple[str, ...]
    """What could not be read."""


def evaluated_section(found: Evaluated) -> str:
    """The whole section; parts without anything to show are left out."""
    parts = [_table(found), _calibration(found), _samples("Fixed prompts", found.fixed)]
    if found.held_out:
        said = f"Answers to held-out prompts ({len(found.held_out)})"
        parts.append(f"<details><summary>{said}</summary>{_listed(found.held_out)}</details>")
    return section("evaluation", "Evaluation", "".join(parts))


def _table(found: Evaluated) -> str:
    if not found.rows:
        return ""
    rows = "".join(f"<tr>{_name(label)}{''.join(_cell(text, found.missing) for text in cells)}</tr>\n" for label, *cells in found.rows)
    note = found.caption[:1].upper() + found.caption[1:]
    return (
        plain_table([(escape(head), "") for head in found.heads], rows, "the evaluation", "narrow") + f"<p class=note>{escape(note)}.</p>"
    )


def _name(label: str) -> str:
    part = " class=part" if label.startswith(" ") else ""
    return f"<th scope=row{part}>{escape(label.strip())}</th>"


def _cell(text: str, missing: str) -> str:
    return f"<td>{escape(NOTHING if text == missing else text.replace('-', MINUS))}</td>"


def _calibration(found: Evaluated) -> str:
    if not found.calibration:
        return ""
    label = "Share of comparisons in which the reward model is right against how sure it is"
    svg = figures.as_svg(lambda axis: figures.draw_calibration(axis, found.calibration), label)
    rows = "".join(
        f"<tr><th scope=row>{escape(one.name).replace('-', NO_BREAK)}\u00a0%</th><td>{one.count:,}</td><td>{number(one.predicted, 3)}</td>"
        f"<td>{number(one.right, 3)}<small>{number(one.low, 3)} to {number(one.high, 3)}</small></td></tr>\n"
        for one in found.calibration
    )
    heads = (("So sure it is", ""), ("Comparisons", ""), ("Mean probability", ""), ("Share right", ""))
    error = "" if found.calibration_error is None else f" Calibration error {number(found.calibration_error, 3)}."
    note = (
        "How often the reward model's choice is right, with Wilson's 95\u00a0% interval, against how sure of it the model is, "
        f"sigmoid(|margin|). On the dashed line it is as sure as it should be.{error}"
    )
    table = plain_table(heads, rows, "calibration", "narrow")
    return (
        "<h3>Calibration of the reward model</h3>"
        f"<div class=panels>{framed(svg, 'Share right against probability')}{table}</div><p class=note>{escape(note)}</p>"
    )


def _samples(heading: str, samples: Sequence[Sample]) -> str:
    return f"<h3>{escape(heading)}</h3>{_listed(samples)}" if samples else ""


def _listed(samples: Sequence[Sample]) -> str:
    return f"<ol class=samples>{''.join(map(_sample, samples))}</ol>"


def _sample(one: Sample) -> str:
    """White space is kept: it is part of an answer."""
    answers = "".join(
        f"<div><dt>{escape(answer.policy)} <small>{escape(answer.said)}</small></dt><dd>{escape(answer.text.strip()) or NOTHING}</dd></div>"
        for answer in one.answers
    )
    return f"<li><p class=prompt>{escape(one.prompt.strip())}</p><dl class=answers>{answers}</dl></li>\n"
