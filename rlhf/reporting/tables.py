"""A folder of experiments/ that stands beside published numbers: published.csv, modelled.csv and results.csv as rows that were checked.

Knows files and arithmetic; knows no planner and draws nothing. A cell is one number: `hardware/gpus/model/quantity`, empty parts left out.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import UserError, nearest

PUBLISHED = ("hardware", "gpus", "model", "quantity", "value", "unit", "source", "note")
MODELLED = ("hardware", "gpus", "model", "quantity", "unit", "dschat", "ours", "half")
"""modelled.csv may have more columns: how the run is laid out."""
RESULTS = ("cell", "value", "unit", "card", "command", "commit")
SCALE = ("model", "engine", "gpus", "sequences_per_s", "stops")
"""scale.csv is there for one table only, and may have more columns."""
HALVES = ("", "fitted", "held out")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    value: float
    card: str
    command: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell with all that is known of it; None: nothing."""

    cell: str
    hardware: str
    gpus: int
    model: str
    quantity: str
    unit: str
    published: float | None
    dschat: float | None
    """Modelled with the original's engine."""
    ours: float | None
    """Modelled with this project's."""
    half: str
    """Of the rows that the original's efficiencies are fitted to: `fitted`, `held out`, or empty where the row has no say in it."""
    measured: Measurement | None

    @property
    def error(self) -> float | None:
        """Modelled with the original's engine over published, less one."""
        return self.dschat / self.published - 1 if self.dschat is not None and self.published is not None else None

    @property
    def error_ours(self) -> float | None:
        """Modelled with our engine over measured, less one."""
        return self.ours / self.measured.value - 1 if self.ours is not None and self.measured is not None else None

    @property
    def absent(self) -> str:
        """What a measurement would need."""
        return f"not run: needs {self.gpus} GPU{'s' if self.gpus > 1 else ''} ({self.hardware})"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number."""

    cell: str
    value: float
    unit: str
    source: str
    note: str


@dataclass(frozen=True, kw_only=True)
class ScaleRow:
    model: str
    engine: str
    gpus: int
    sequences_per_s: float | None
    """None: nothing fits."""
    stops: str
    """Why the last doubling brought too little, at the first that did."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    folder: Path
    title: str
    rows: tuple[Row, ...]
    published: tuple[Published, ...]
    """All of published.csv, in its order."""
    scale: tuple[ScaleRow, ...]

    @property
    def left_out(self) -> list[Published]:
        """Published and not modelled."""
        modelled = {row.cell for row in self.rows}
        return [one for one in self.published if one.cell not in modelled]


def median_error(rows: list[Row], half: str | None = None) -> float | None:
    """Of the absolute errors of the rows that have one; None: none has."""
    errors = [abs(row.error) for row in rows if row.error is not None and half in (None, row.half)]
    return statistics.median(errors) if errors else None


def read_experiment(folder: Path) -> Experiment:
    """All files of one folder.

    Raises:
        UserError: the folder or a file is not there, or a row is malformed: file, line and what is wrong with it.
    """
    if not folder.is_dir():
        near = nearest(folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()]) if folder.parent.is_dir() else ""
        raise UserError(f"report.runs: there is no folder {folder}{near}")
    for name in ("published.csv", "modelled.csv", "results.csv"):
        if not (folder / name).is_file():
            raise UserError(
                f"report.runs: {folder} has no {name}; rlhf report reads folders with published.csv, modelled.csv and results.csv"
            )
    published = _published(folder / "published.csv")
    results = _results(folder / "results.csv")
    rows = tuple(_rows(folder / "modelled.csv", published, results))
    known = [*published, *(row.cell for row in rows)]
    for cell, (line, unit, _) in results.items():
        where = f"{folder / 'results.csv'}:{line}"
        if cell not in known:
            raise UserError(f"{where}: {cell} is in neither published.csv nor modelled.csv{nearest(cell, known)}")
        expected = published[cell].unit if cell in published else next(row.unit for row in rows if row.cell == cell)
        if unit != expected:
            raise UserError(f"{where}: the unit of {cell} is {expected!r}, got {unit!r}")
    scale = folder / "scale.csv"
    return Experiment(
        folder=folder, title=_title(folder), rows=rows, published=tuple(published.values()), scale=_scale(scale) if scale.is_file() else (),
    )  # fmt: skip


def cell_name(hardware: str, gpus: str | int, model: str, quantity: str) -> str:
    return "/".join(str(part) for part in (hardware, gpus, model, quantity) if part != "")


# --- files ----------------------------------------------------------------------------------------------------------------------


def _published(file: Path) -> dict[str, Published]:
    found: dict[str, Published] = {}
    for line, row in read_csv(file, PUBLISHED):
        if row["gpus"]:
            _count(row["gpus"], file, line)
        cell = cell_name(row["hardware"], row["gpus"], row["model"], row["quantity"])
        if not row["quantity"] or not row["unit"] or not row["source"]:
            raise UserError(f"{file}:{line}: quantity, unit and source must not be empty")
        if cell in found:
            raise UserError(f"{file}:{line}: {cell} is there already")
        value = _number(row["value"], "value", file, line)
        found[cell] = Published(cell=cell, value=value, unit=row["unit"], source=row["source"], note=row["note"])
    return found


def _results(file: Path) -> dict[str, tuple[int, str, Measurement]]:
    """Cell -> line, unit and number; of a cell that was measured again, the last."""
    found = {}
    for line, row in read_csv(file, RESULTS):
        for name in RESULTS:
            if not row[name]:
                raise UserError(f"{file}:{line}: {name} must not be empty")
        value = _number(row["value"], "value", file, line)
        found[row["cell"]] = (line, row["unit"], Measurement(value=value, card=row["card"], command=row["command"], commit=row["commit"]))
    return found


def _rows(file: Path, published: dict[str, Published], results: dict[str, tuple[int, str, Measurement]]) -> Iterator[Row]:
    seen = set()
    for line, row in read_csv(file, MODELLED):
        cell = cell_name(row["hardware"], row["gpus"], row["model"], row["quantity"])
        if cell in seen:
            raise UserError(f"{file}:{line}: {cell} is there already")
        seen.add(cell)
        known = published.get(cell)
        if known is not None and known.unit != row["unit"]:
            raise UserError(f"{file}:{line}: the unit of {cell} is {known.unit!r} in published.csv, got {row['unit']!r}")
        if row["half"] not in HALVES:
            raise UserError(f"{file}:{line}: half must be empty, 'fitted' or 'held out', got {row['half']!r}")
        dschat, ours = (_number(row[name], name, file, line) if row[name] else None for name in ("dschat", "ours"))
        yield Row(
            cell=cell, hardware=row["hardware"], gpus=_count(row["gpus"], file, line), model=row["model"], quantity=row["quantity"],
            unit=row["unit"], published=None if known is None else known.value, dschat=dschat, ours=ours, half=row["half"],
            measured=results[cell][2] if cell in results else None,
        )  # fmt: skip


def _scale(file: Path) -> tuple[ScaleRow, ...]:
    return tuple(
        ScaleRow(
            model=row["model"], engine=row["engine"], gpus=_count(row["gpus"], file, line), stops=row["stops"],
            sequences_per_s=_number(row["sequences_per_s"], "sequences_per_s", file, line) if row["sequences_per_s"] else None,
        )
        for line, row in read_csv(file, SCALE)
    )  # fmt: skip


def read_csv(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a file that has at least these columns.

    Raises:
        UserError: a column is missing, or a row has more or fewer fields than the header.
    """
    try:
        with file.open(newline="", encoding="utf-8") as text:
            reader = csv.DictReader(text, strict=True)
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{file}:1: no column {', '.join(missing)}; there must be {', '.join(columns)}")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{file}:{reader.line_num}: another number of fields than the {len(reader.fieldnames or [])} of the header"
                    )
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a table of comma-separated values: {error}") from error


def _number(text: str, name: str, file: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{file}:{line}: {name} must be a number above 0, got {text!r}")
    return value


def _count(text: str, file: Path, line: int) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{file}:{line}: gpus must be a whole number of at least 1, got {text!r}")
    return int(text)


def _title(folder: Path) -> str:
    """The first heading of the folder's README.md, or the folder's name."""
    readme = folder / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), folder.name)
