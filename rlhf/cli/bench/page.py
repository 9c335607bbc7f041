"""What `rlhf bench` prints: tables of numbers that are already known. Measures nothing."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from rlhf.engines.bench_rollout import Rates, Row

PARTS = ("gather", "swap", "prefill", "decode", "free")
WIDTH = 160
"""Characters of a line where the output is no terminal."""
GB = 1e9


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def print_rollout(title: str, rows: list[Row], rates: Rates) -> None:
    """One line a measurement, and the floor of each batch above its engines."""
    table = Table(title=title)
    parts = [part for part in PARTS if any(part in row.parts for row in rows)]
    on_card = any(row.peak_bytes is not None for row in rows)
    captures = any(row.capture_seconds is not None for row in rows)
    table.add_column("engine")
    for name in ("batch", "seconds", "tok/s", "of floor", "x hf_dynamic", "x hf_static", *(f"{part} s" for part in parts)):
        table.add_column(name, justify="right")
    for name, shown in (("peak GB", on_card), ("free GB", on_card), ("capture s", captures)):
        if shown:
            table.add_column(name, justify="right")
    last = None
    for row in rows:
        if row.batch != last:
            table.add_section()
            _add_floor(table, row, rows)
        last = row.batch
        cells = _cells(row) + [significant(row.parts.get(part)) for part in parts]
        cells += [number(row.peak_bytes, 1, GB), number(row.free_bytes, 1, GB)] if on_card else []
        table.add_row(*cells, *([number(row.capture_seconds, 1)] if captures else []))
    out = console()
    out.print(table)
    out.print(f"measured: copy {rates.bandwidth / 1e9:,.0f} GB/s (read and write), matrix product {rates.matmul / 1e12:,.2f} TFLOP/s")
    for row in rows:
        if row.note:
            out.print(f"{row.engine}, batch {row.batch}: {row.note}", markup=False)
        if "of_fixed" in row.ratios:
            out.print(f"{row.engine}, batch {row.batch}: geometric lengths give {row.ratios['of_fixed']:.2f} of the fixed-length tok/s")


def _add_floor(table: Table, row: Row, rows: list[Row]) -> None:
    """The lowest floor of the batch, that of the hybrid engine where it shares weights between ranks."""
    known = [other for other in rows if other.batch == row.batch and other.floor_seconds and other.tokens]
    if known:
        best = min(known, key=lambda other: other.floor_seconds or 0.0)
        assert best.floor_seconds is not None
        table.add_row("floor", str(row.batch), significant(best.floor_seconds), f"{best.tokens / best.floor_seconds:,.0f}", "1.00")


def _cells(row: Row) -> list[str]:
    name = row.engine if row.lengths == "fixed" else f"{row.engine}, {row.lengths}"
    if not row.tokens:
        return [name, str(row.batch), "-", "-", "-", "-", "-"]
    ratios = [number(row.ratios.get(key), 2) for key in ("of_floor", "vs_hf_dynamic", "vs_hf_static")]
    return [name, str(row.batch), significant(row.seconds), f"{row.tokens_per_s:,.0f}", *ratios]


def number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def significant(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g}"


def print_parity(title: str, rows: list[list[str]], columns: list[str], remarks: list[str]) -> None:
    """A line for each model and precision, a column for each way to run it; below, what was skipped and what failed."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    out = console()
    out.print(table)
    for remark in remarks:
        out.print(remark, markup=False, soft_wrap=True)
