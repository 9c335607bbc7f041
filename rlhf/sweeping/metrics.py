"""What a running cell has written so far. Knows metrics.csv; knows no metric."""

from __future__ import annotations

import csv
from pathlib import Path


def column(folder: Path, name: str) -> list[tuple[int, float]] | None:
    """Steps and values of one column of a run, or of the steps of a pipeline; None where no file has it.

    A line that is being written is left for the next look. Names may be quoted, with ends of lines in them.
    """
    found: list[tuple[int, float]] | None = None
    for file in (folder / "metrics.csv", *sorted(folder.glob("*/metrics.csv"))):
        if not file.is_file():
            continue
        with file.open(encoding="utf-8", newline="\n") as lines:
            rows = csv.DictReader(line for line in lines if line.endswith("\n"))
            if name in (rows.fieldnames or ()):
                found = [*(found or []), *((int(row["step"]), float(row[name])) for row in rows if row[name])]
    return found
