"""Pieces of report.html: sections, tables and figures. Knows HTML; knows no study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from rlhf.reporting.statistics import Estimate
from rlhf.reporting.words import NOTHING, interval, number


def section(name: str, heading: str, body: str) -> str:
    """`body` is markup."""
    return f"<section id={name} aria-labelledby={name}-h><h2 id={name}-h>{escape(heading)}</h2>{body}</section>\n"


def sortable(heads: Sequence[tuple[str, str]], rows: str, name: str) -> str:
    """A table whose columns, given by heading and kind, sort by the `data-v` of their cells; it scrolls in its own box."""
    made = "".join(f"<th scope=col{_kind(kind)} aria-sort=none><button type=button>{breakable(head)}</button></th>" for head, kind in heads)
    return _scrolling(f' class="sortable {name}"', made, rows, name)


def plain_table(heads: Sequence[tuple[str, str]], rows: str, name: str, kind: str = "") -> str:
    """As `sortable`, with rows whose order is their meaning; headings are markup, `kind` is the table's class."""
    return _scrolling(_kind(kind), "".join(f"<th scope=col{_kind(kind)}>{head}</th>" for head, kind in heads), rows, name)


def _scrolling(attributes: str, heads: str, rows: str, name: str) -> str:
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="Table of {name}"><table{attributes}><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{rows}</tbody></table></div>"
    )


def _kind(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def value_cell(text: str, value: float | str, kind: str = "") -> str:
    """A `td` that sorts by `value`, nan behind all."""
    key = "" if isinstance(value, float) and math.isnan(value) else value
    return f'<td{_kind(kind)} data-v="{escape(str(key))}">{escape(text)}</td>'


def number_cell(value: float, digits: int) -> str:
    return value_cell(number(value, digits), value)


def estimate_cell(one: Estimate | None, digits: int, *, sign: bool = False) -> str:
    """The mean, and below it the interval where there is one."""
    if one is None or not one.n:
        return value_cell(NOTHING, math.nan)
    spread = f"<small>{interval(one.low, one.high, digits, sign=sign)}{' †' if one.too_narrow else ''}</small>" if one.n > 1 else ""
    return f'<td data-v="{one.mean!r}">{number(one.mean, digits, sign=sign)}{spread}</td>'


def framed(svg: str, caption: str = "") -> str:
    """A drawing and its caption, which is markup."""
    return f"<figure>{f'<figcaption>{caption}</figcaption>' if caption else ''}{svg}</figure>"


def breakable(name: str) -> str:
    """A path may break where its parts meet."""
    return escape(name).replace("/", "/<wbr>")
